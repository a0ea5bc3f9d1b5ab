"""Files that are parsed once a process: what is composed is what it was, and what has changed is read again."""

from pathlib import Path

from posttrain.config.compose import compose_run, opened, shipped_keys


def test_what_was_composed_before_leaves_no_trace() -> None:
    before = compose_run("sft", [])
    other = compose_run(
        "sft", ["+peft=qlora", "train.max_steps=3", "optim.lr=0.5", "eval.sets.mine=mine.jsonl", "weights.gamma=1"]
    )
    assert other["optim"]["lr"] == 0.5 and other["train"]["max_steps"] == 3 and "mine" in other["eval"]["sets"]
    assert compose_run("sft", []) == before


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "optim" / "mine.yaml"
    file.parent.mkdir()
    for rate in ("0.25", "0.125"):
        file.write_text(f"defaults: [adamw, _self_]\nlr: {rate}\n")
        assert compose_run("sft", ["optim=mine"], tmp_path)["optim"]["lr"] == float(rate)
    assert compose_run("sft", [])["optim"]["lr"] != 0.125


def test_the_keys_of_a_stage_are_those_of_all_its_methods(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.yaml").write_text("method: mine\nhow: {wide: 3}\n")
    with opened(tmp_path) as hydra:
        keys = shipped_keys(hydra, "sft")
    assert {"peft", "peft.r", "peft.length", "peft.how.wide", "quant.double_quant", "optim.lr", "cot.marker"} <= set(keys)
