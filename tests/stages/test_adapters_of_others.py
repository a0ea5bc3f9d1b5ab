"""An adapter that peft has saved, and no run of ours: whoever takes it computes what peft computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain
from posttrain.commands.compose import compose_runs
from posttrain.commands.merge import merge_run
from posttrain.errors import UserError
from posttrain.models.builtin import builtin_directory

pytestmark = pytest.mark.slow
SMALL = ["model=tiny", "train.max_steps=1", "train.batch_size=2", "train.max_length=128", "data.eval_share=0.2", "eval.sets=null"]
LORA = ["+peft=lora", "peft.r=4", "peft.alpha=8", "optim.lr=1e-9", "model.dtype=float32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter/ as peft saves it, and rows."""
    place, base = tmp_path_factory.mktemp("others"), str(builtin_directory("tiny")[0])
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    made.save_pretrained(str(place / "adapter"))
    rows = [{"prompt": f"Say {i}:", "completion": f" it is {i}."} for i in range(30)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def logits(directory: Path, adapter: Path | None) -> torch.Tensor:
    base = str(builtin_directory("tiny")[0])
    model = AutoModelForCausalLM.from_pretrained(directory if adapter is None else base)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    tokens = AutoTokenizer.from_pretrained(base)("Say 7: it is", return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.float().log_softmax(-1)


def test_each_mode_starts_from_what_peft_computes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a rate of nothing the run leaves what it began with."""
    wanted = logits(place, place / "adapter")
    plain = logits(builtin_directory("tiny")[0], None)
    assert float((wanted - plain).abs().max()) > 0.05
    words = [*SMALL, *LORA, f"data.path={place}/rows.jsonl", f"init={place}/adapter"]
    for mode in ("stack", "continue"):
        posttrain.run("sft", *words, f"chain.mode={mode}", f"run.dir={place}/{mode}")
        torch.testing.assert_close(logits(place, place / mode / "adapter"), wanted, atol=1e-4, rtol=0)
    said = " ".join(capsys.readouterr().out.split())
    assert "init: an adapter of others; its base is" in said
    with pytest.raises(UserError, match=r"goes on with has 4, not 8; say peft\.r=4"):
        posttrain.run("sft", *words, "peft.r=8", "chain.mode=continue", f"run.dir={place}/other")


def test_commands_take_it(place: Path) -> None:
    wanted = logits(place, place / "adapter")
    figures = merge_run(place / "adapter", place / "merged", 0.05)
    assert figures["candidates"]["full"]["kl"] < 0.001
    torch.testing.assert_close(logits(place / "merged", None), wanted, atol=0.05, rtol=0)
    loaded = posttrain.load(str(place / "adapter"), device="cpu")
    assert len(loaded.generate("Say", max_new_tokens=3)) == 1
    found = posttrain.evaluate(str(place / "adapter"), f"data.path={place}/rows.jsonl")
    assert found["adapter"]["data/loss"] > 0
    manifest = posttrain.run("sft", *SMALL, *LORA, f"data.path={place}/rows.jsonl", f"run.dir={place}/first")
    assert manifest["weights"]["kind"] == "adapter"
    compose_runs([str(place / "first"), str(place / "adapter")], place / "sum", None, None)
    torch.testing.assert_close(
        logits(place, place / "sum" / "adapter"), wanted, atol=1e-4, rtol=0
    )  # the first has learnt nothing
    compose_runs([str(place / "adapter"), str(place / "first")], place / "swapped", None, None)
    torch.testing.assert_close(logits(place, place / "swapped" / "adapter"), wanted, atol=1e-4, rtol=0)


def test_a_sum_of_adapters_none_of_which_is_a_runs(place: Path) -> None:
    """0.5 A + 0.25 A + 0.25 A is A; and the result is a run's directory to the commands behind it."""
    wanted = logits(place, place / "adapter")
    other = shutil.copytree(place / "adapter", place / "second")
    third = shutil.copytree(place / "adapter", place / "third")
    names = [str(place / "adapter"), str(other), str(third)]
    manifest = compose_runs(names, place / "others", [0.5, 0.25, 0.25], None)
    torch.testing.assert_close(logits(place, place / "others" / "adapter"), wanted, atol=1e-4, rtol=0)
    assert manifest["stage"] == "compose" and manifest["parents"] == [] and manifest["base"]["digest"]
    words = [*SMALL[1:], *LORA, f"data.path={place}/rows.jsonl", f"init={place}/others", f"run.dir={place}/on"]
    assert posttrain.run("sft", *words)["parents"][0]["role"] == "init"
    torch.testing.assert_close(logits(place, place / "on" / "adapter"), wanted, atol=1e-4, rtol=0)
    assert len(posttrain.load(str(place / "others"), device="cpu").generate("Say", max_new_tokens=3)) == 1
    learned = compose_runs(names[:2], place / "learned", None, place / "rows.jsonl")
    assert len(learned["sum"]) == 2
