"""peft's own tuners: numbers by the closed form, no change at the start, read again by plain peft, merged to the same model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.models.peft.test_methods import FF, KV, LAYERS, SHAPES, D, load, logits, make, trained

import posttrain
from posttrain.commands.compose import compose_runs
from posttrain.commands.merge import merge_run
from posttrain.config.compose import compose_run, validate
from posttrain.errors import UserError
from posttrain.models.counting import count_parameters
from posttrain.models.peft.attach import NEW, add_method, load_adapter
from posttrain.models.peft.export import export_adapter
from posttrain.models.peft.kinds import is_plain_sum
from posttrain.models.peft.merge import Adapter
from posttrain.stages.language.init import chain_mode

MATRICES = SHAPES["llama"] * LAYERS
IA3 = LAYERS * (D + 2 * KV + D + 2 * FF + FF)  # outputs of all but the MLP's last, whose inputs it scales
# settings, and how many numbers they train of all matrices [in, out]
TUNERS: dict[str, tuple[list[str], int]] = {
    "shira": (["peft.r=2"], sum(2 * (a + b) for a, b in MATRICES)),
    "miss": (["peft.r=8"], sum(8 * b for _, b in MATRICES)),
    "oft": (["peft.block_size=8"], sum(a // 8 * (8 * 7 // 2) for a, _ in MATRICES)),
    "gralora": (["peft.r=4"], sum(4 * (a + b) for a, b in MATRICES)),
    "hira": (["peft.r=4"], sum(4 * (a + b) for a, b in MATRICES)),
    "lokr": (["peft.r=4"], 1760),  # see test_lokr_by_hand
    "loha": (["peft.r=4"], sum(2 * 4 * (a + b) for a, b in MATRICES)),
    "ia3": ([], IA3),
    "c3a": (["peft.block_size=16"], sum(a * b // 16 for a, b in MATRICES)),
}
ON_QUANTIZED = [(name, quant) for name in TUNERS if name not in ("lokr", "loha") for quant in ("nf4", "int8")]
ON_QUANTIZED.remove(("shira", "int8"))  # which it has to read
ON_QUANTIZED.remove(("oft", "nf4"))  # among the fast ones


def method(name: str, *more: str) -> Any:
    return validate(compose_run("sft", [f"peft={name}", *TUNERS[name][0], *more])).peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TUNERS)
def test_trained_numbers_are_the_closed_form_with_weights_and_without(name: str) -> None:
    with torch.device("meta"):
        shapes = make("llama")
    found = [count_parameters(add_method(model, method(name), 10))[0] for model in (make("llama"), shapes)]
    assert found == [TUNERS[name][1]] * 2


def test_lokr_by_hand() -> None:
    """Of q_proj, 64 x 64 = (8 x 8) x (8 x 8): a factor of 8 x 8, and one of that size by rank 4, which is whole there: 64 + 64.
    A factor of 64 x 96 is 8 x 8 and (8 r + r 12)."""
    model = add_method(make("llama"), method("lokr", "peft.targets=[q_proj,up_proj]"), 10)
    assert count_parameters(model)[0] == LAYERS * ((64 + 64) + (64 + 4 * (8 + 12)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quant"), ON_QUANTIZED)
def test_so_it_does_on_a_quantized_base(base: Path, name: str, quant: str, tmp_path: Path) -> None:
    check(base, name, quant, tmp_path)


@pytest.mark.parametrize(("name", "quant"), [*((name, "none") for name in TUNERS), ("oft", "nf4")])
def test_it_starts_as_the_base_and_plain_peft_reads_it_again(base: Path, name: str, quant: str, tmp_path: Path) -> None:
    check(base, name, quant, tmp_path)


def check(base: Path, name: str, quant: str, tmp_path: Path) -> None:
    bare = logits(load(base, quant))
    model: Any = add_method(load(base, quant), method(name), 10)
    torch.testing.assert_close(logits(model), bare, rtol=0, atol=1e-6)
    trained(model)
    live = logits(model)
    assert (live - bare).abs().max() > 1e-3
    export_adapter(model, tmp_path, str(base))
    again = PeftModel.from_pretrained(load(base, quant), str(tmp_path))
    torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-6)
    if quant == "none":
        adapter, merged = Adapter(tmp_path, "run"), load(base)
        adapter.require_mergeable("run", "")
        assert len(adapter.modules) == len(MATRICES) and not is_plain_sum(adapter.config)
        with torch.no_grad():
            for layer in adapter.modules:
                weight = merged.get_submodule(layer).weight
                weight.copy_(adapter.applied(layer, weight))
        torch.testing.assert_close(logits(merged), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TUNERS)
def test_one_that_has_learned_nothing_is_not_merged(base: Path, name: str, tmp_path: Path) -> None:
    model: Any = add_method(load(base), method(name), 10)
    export_adapter(model, tmp_path, str(base))
    with pytest.raises(UserError, match="is all zero: its run has learned nothing"):
        Adapter(tmp_path, "run")


@pytest.mark.parametrize("name", TUNERS)
def test_it_goes_on_with_what_it_has_left(base: Path, name: str, tmp_path: Path) -> None:
    model: Any = add_method(load(base), method(name), 10)
    trained(model)
    live = logits(model)
    export_adapter(model, tmp_path, str(base))
    again = method(name).continue_from(load(base), tmp_path)
    torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-6)
    assert count_parameters(again)[0] == TUNERS[name][1] and NEW in load_adapter(load(base), tmp_path).peft_config


def test_going_on_with_other_settings_is_refused(base: Path, tmp_path: Path) -> None:
    model: Any = add_method(load(base), method("oft"), 10)
    export_adapter(model, tmp_path, str(base))
    with pytest.raises(UserError, match=r"^peft.block_size: the adapter that chain.mode=continue goes on with has 8, not 16"):
        method("oft", "peft.block_size=16").continue_from(load(base), tmp_path)


@pytest.mark.parametrize(
    ("name", "quant", "why"),
    [
        ("lokr", "nf4", "quant=nf4 cannot be trained by lokr; add +peft=qlora, or say quant=none"),
        ("loha", "int8", "quant=int8 cannot be trained by loha; add"),
        ("shira", "int8", "quant=int8 cannot be trained by shira, which has to read the whole weight; say quant=nf4"),
    ],
)
def test_what_cannot_go_on_a_quantized_base_is_refused(name: str, quant: str, why: str) -> None:
    with pytest.raises(UserError, match=re.escape(why)):
        validate(compose_run("sft", [f"peft={name}", f"quant={quant}"]))


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("oft", "peft.block_size=7", "peft.block_size=7 does not divide their inputs"),
        ("c3a", "peft.block_size=24", "no adapter on"),
        ("gralora", "peft.k=3", "peft.k=3 does not divide their sides"),
        ("shira", "peft.r=60", "they have fewer numbers than shira of r=60 would train"),
        ("miss", "peft.r=4000", "peft.r: 4000 is above the smaller side"),
    ],
)
def test_layers_that_do_not_fit_are_left_out_or_an_error(
    name: str, more: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        add_method(make("llama"), method(name, more), 10)
        said = " ".join(capsys.readouterr().out.split())
    except UserError as error:
        said = str(error)
    assert why in said


def test_weights_that_are_kept_transposed_are_left_out() -> None:
    with pytest.raises(UserError, match="peft=oft cannot be put on weights that are kept transposed"):
        add_method(make("gpt2"), method("oft"), 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNERS)
def test_a_run_of_three_steps_is_merged_and_neither_composed_nor_stacked(name: str, tmp_path: Path) -> None:
    words = ("model=tiny", "train.max_steps=3", "train.batch_size=2", "data.max_rows=20", "data.eval_rows=4", "eval.sets=null")
    words = (*words, "train.max_length=64", "train.grad_accum=1", f"peft={name}", "optim.lr=1e-2")
    manifest = posttrain.run("sft", *words, f"run.dir={tmp_path / 'run'}")
    figures = manifest["metrics"]
    assert manifest["trainable"]["trained"] > 0 and abs(figures["eval/loss"] - figures["eval/loss_before"]) > 1e-3
    merged = merge_run(tmp_path / "run", tmp_path / "merged", 1e-6)
    assert merged["kept"] == "full" and merged["candidates"]["full"]["top1"] == 1.0
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["peft_type"] == name.upper()
    with pytest.raises(UserError, match=name):
        compose_runs([str(tmp_path / "run"), str(tmp_path / "run")], tmp_path / "sum", None, None)
    cfg = validate(compose_run("sft", [*words, "chain.mode=stack", "model=tiny"]))
    with pytest.raises(UserError, match=f"stack needs changes that are sums, which peft={name} is not; say chain.mode=merge"):
        chain_mode(cfg, adapter)
    over = validate(compose_run("sft", ["model=tiny", "peft=lora", "chain.mode=stack"]))
    with pytest.raises(UserError, match=f"which init's {name} adapter is not; say chain.mode=merge"):
        chain_mode(over, adapter)
    modes = {
        mode: chain_mode(validate(compose_run("sft", [*words, f"chain.mode={mode}"])), adapter) for mode in ("auto", "continue")
    }
    assert modes == {"auto": "merge", "continue": "continue"}
