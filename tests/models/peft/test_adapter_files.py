"""Adapters that others have saved, damaged or with settings of their own: read as they are, or refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.commands import evaluate
from posttrain.commands.compose import compose_runs
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.loading import load_in_turn, load_model, load_models, switch
from posttrain.models.peft.attach import add_method, load_adapter, put_beside
from posttrain.models.peft.merge import Adapter, write_merged
from posttrain.models.peft.tokens import rows_of, size_of
from posttrain.runs.artifact import open_artifact

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(builtin_directory("tiny")[0]))


def saved(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    made = get_peft_model(tiny(), LoraConfig(**(LORA | settings)))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    made.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters") / "whole")


def changed(whole: Path, folder: Path, change: Any) -> Path:
    """A copy whose tensors `change` has changed in place."""
    shutil.copytree(whole, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def cut(tensors: dict[str, Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST][:, :-1].contiguous()


def more(tensors: dict[str, Tensor]) -> None:
    tensors[FIRST.replace("layers.0", "layers.77")] = tensors[FIRST].clone()


def broken(tensors: dict[str, Tensor]) -> None:
    tensors[FIRST][0, 0] = float("nan")


DAMAGED = [
    (lambda tensors: tensors.pop(FIRST), r"lacks 1 tensor, which would be random numbers \(.*layers.0.self_attn.q_proj.lora_A"),
    (cut, r"has 1 tensor of another shape than the base asks for \(.*q_proj.lora_A.* is 4x\d+, not 4x\d+\)"),
    (more, r"has 1 tensor that the base has no place for \(.*layers.77"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), DAMAGED, ids=["lacking", "cut", "more"])
def test_a_damaged_adapter_is_never_loaded(whole: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = changed(whole, tmp_path / "damaged", change)
    with pytest.raises(
        UserError, match=rf"the adapter in {folder} {said}.*; give the whole adapter, and the base it belongs to$"
    ):
        load_adapter(tiny(), folder)
    method = typed_config(compose_run("sft", ["model=tiny", "peft=lora"])).peft
    model: Any = add_method(tiny(), method)
    with pytest.raises(UserError, match=f"the adapter in {folder} "):
        put_beside(model, folder, "init")


def test_half_a_layer_is_not_merged(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "damaged", lambda tensors: tensors.pop(FIRST))
    with pytest.raises(UserError, match=r"^run: the adapter in \S+ lacks model.layers.0.self_attn.q_proj.lora_A.weight"):
        write_merged(builtin_directory("tiny")[0], Adapter(folder, "run"), tmp_path / "merged")


def test_values_that_are_not_finite_are_not_merged(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "damaged", broken)
    with pytest.raises(
        UserError, match=r"^run: the adapter in \S+ holds values that are not finite, in model.layers.0.\S+lora_A"
    ):
        Adapter(folder, "run")


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"},
                                      {"trainable_token_indices": [1, 5]}, {"init_lora_weights": "pissa"},
                                      {"rank_pattern": {"v_proj": 2}}], ids=str)  # fmt: skip
def test_a_whole_one_computes_what_peft_computes(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = saved(tmp_path / "adapter", **settings)
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny(), str(folder)).eval()(ids).logits
        ours = load_adapter(tiny(), folder)(ids).logits
        plain = tiny()(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert float((theirs - plain).abs().max()) > 1e-3


def test_rows_of_tokens_may_be_a_list(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", trainable_token_indices=[1, 5])
    assert size_of(folder) == 6
    rows = rows_of(folder)
    assert {layer: ids for layer, (ids, _) in rows.items()} == {"model.embed_tokens": [1, 5]}
    write_merged(builtin_directory("tiny")[0], Adapter(folder, "run"), tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny(), str(folder)).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, theirs, atol=1e-4, rtol=0)


def test_what_an_adapter_adds_is_more_than_its_tensors(whole: Path, tmp_path: Path) -> None:
    """Merged models, answers and log-probs are kept by it."""

    def digest(**settings: Any) -> str:
        folder = shutil.copytree(whole, tmp_path / str(len(list(tmp_path.iterdir()))))
        config = json.loads((folder / "adapter_config.json").read_text()) | settings
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return open_artifact(folder, "init").digest

    assert digest() == digest(inference_mode=False, base_model_name_or_path="elsewhere", peft_version="1")
    assert len({digest(), digest(lora_alpha=16), digest(use_rslora=True), digest(alpha_pattern={"q_proj": 2})}) == 4


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_changes_the_base_is_measured_alone(whole: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Beside it another one would be measured on what it has made of the base."""
    other = saved(tmp_path / "other", **settings)
    ids = torch.tensor([[1, 5, 9, 3]])
    for pair in ([whole, other], [other, whole]):
        for live, names in load_in_turn([str(each) for each in pair], "cpu"):
            for name in names:
                switch(live, names, name)
                folder = next(each for each in pair if each.name == name)
                with torch.no_grad():
                    alone = load_adapter(tiny().to(live.model.dtype), folder)(ids).logits
                    torch.testing.assert_close(live.model(ids).logits, alone, atol=0.02, rtol=0)  # bfloat16


def test_two_that_cannot_be_told_apart_are_refused_by_chat(whole: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", init_lora_weights="pissa")
    with pytest.raises(UserError, match="other has to lie on a base of its own; give it alone"):
        load_models([str(whole), str(other)], "cpu")


def test_a_base_that_is_gone_is_spoken_of_as_the_adapters(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "moved")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for field, use in (
        ("run", lambda: load_model(str(folder))),
        ("init", lambda: posttrain.run("sft", f"init={folder}", f"run.dir={tmp_path}/run")),
    ):
        said = rf"^{field}: the base of {folder} is {tmp_path}/gone by its adapter_config.json, and is not there; write another"
        with pytest.raises(UserError, match=said):
            use()


def test_the_bases_revision_is_the_adapters_word(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "pinned")
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, revision in (("org/base", "abc"), (str(builtin_directory("tiny")[0]), None)):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base, "revision": "abc"}))
        assert open_artifact(folder, "init").base.revision == revision


def test_another_model_than_the_adapters_base_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^init: \S+ is an adapter of \S+, not of model smollm2; leave model out, or write"):
        posttrain.run("sft", f"init={whole}", "model=smollm2", f"run.dir={tmp_path}/run")
    small = ["model=tiny", "train.max_steps=1", "train.max_length=64", "eval.sets=null", "peft=lora"]
    with pytest.raises(UserError, match=r"^chain.mode: continue goes on with an adapter, and init is a whole model"):
        posttrain.run("sft", *small, f"init={builtin_directory('tiny')[0]}", "chain.mode=continue", f"run.dir={tmp_path}/other")
    with pytest.raises(UserError, match=r"^chain.mode: continue goes on with an adapter, and there is no init"):
        posttrain.run("sft", *small, "chain.mode=continue", f"run.dir={tmp_path}/run")


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_what_could_not_be_saved_is_not_gone_on_with(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A whole module, a bias, what PiSSA has taken out of the base: no run would write it, and its result would lack it."""
    folder, small = saved(tmp_path / "other", **settings), ["train.max_steps=1", "train.max_length=64", "eval.sets=null"]
    lora = ["peft=lora", "peft.r=4", "peft.alpha=8", "peft.targets=[q_proj,v_proj]"]
    for mode in ("continue", "auto"):
        words = [*small, *lora, f"init={folder}", f"chain.mode={mode}", f"run.dir={tmp_path}/{mode}"]
        with pytest.raises(
            UserError, match=rf"{next(iter(settings))}=.*; put it into its base by peft's merge_and_unload first$"
        ):
            posttrain.run("sft", *words)


def test_adapters_of_unlike_shapes_are_not_added(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "damaged", cut)
    with pytest.raises(UserError, match=r"in \S+damaged at model.layers.0.self_attn.q_proj has another shape \(\S+, not \S+\)"):
        compose_runs([str(whole), str(folder)], tmp_path / "sum", None, None)
    assert not (tmp_path / "sum").exists()


def test_every_name_is_looked_up_before_any_is_measured(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_in_turn", lambda *_: pytest.fail("a model is loaded"))
    (tmp_path / "t.txt").write_text("Some text.\n")
    with pytest.raises(UserError, match=r"^run: 'org/none' is no directory and not to be had"):
        evaluate.evaluate_runs([str(whole), "org/none", f"data.path={tmp_path}/t.txt"])
