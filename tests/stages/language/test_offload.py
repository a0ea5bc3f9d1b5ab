"""train.offload=layers: the same numbers to the last bit, with one layer of the base in memory."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import posttrain
from posttrain.batch import PackedBatch, Segment
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import RunError, Stopped, UserError
from posttrain.models.hub import resolve
from posttrain.models.offload import activations
from posttrain.models.offload.stream import LayerStream
from posttrain.stages.language.build import build_model
from posttrain.stages.language.checkpoint import check_checkpoint
from posttrain.stages.language.init import find_base, resolve_start
from posttrain.stages.language.recompute import fit_memory

RUN = ("model=tiny", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "eval.sets=null")
LAYERS = "train.offload=layers"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def model_of(*words: str) -> Any:
    cfg: Any = typed_config(compose_run("sft", [*RUN, *words]))
    start = resolve_start(cfg)
    built = build_model(cfg, start, find_base(start, None), 2, CPU)
    fit_memory(cfg, built.module, built, 48, CPU)
    return built.module.train()


def pack() -> PackedBatch:
    """Two documents of 24 random tokens, all of which are targets but the first."""
    tokens = torch.randint(5, 500, (1, 48), generator=torch.Generator().manual_seed(3))
    index = torch.tensor([i for i in range(48) if i % 24 != 23])
    return PackedBatch(
        tokens=tokens, positions=torch.arange(24).repeat(2)[None], segments=(Segment(0, 24), Segment(24, 48)),
        logit_index=index, target=tokens[0][index + 1], weight=torch.ones(len(index)), sequence_id=index // 24,
        eos_index=torch.tensor([23, 47]), num_answers=2, rows=(0, 1), loss_denominator=1.0,
    )  # fmt: skip


def gradients(module: Any) -> dict[str, torch.Tensor]:
    """With adapters that are no longer zero."""
    random = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 0.02 * torch.randn(p.shape, generator=random).to(p.dtype)
    module(pack()).sum().backward()
    return {name: p.grad for name, p in trained.items() if p.grad is not None}


def mapped_under(folder: Path) -> set[str]:
    """Files of layers that are in this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if str(folder / "cache" / "layers") in line}


@pytest.mark.parametrize(
    "words",
    [
        ("+peft=lora",),
        pytest.param(("+peft=qlora",), marks=pytest.mark.slow),
        ("+peft=qlora", "peft.targets=[q_proj]", "quant.double_quant=false"),  # layers without an adapter are bitsandbytes' own
        pytest.param(("+peft=dora", "quant=nf4", "model.kernels=reference"), marks=pytest.mark.slow),
    ],
)
def test_gradients_have_the_same_bits_with_one_layer_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    resident = gradients(model_of(*words))
    there: list[int] = []
    came: list[int] = []
    bring = LayerStream.bring

    def counted(self: LayerStream, i: int) -> None:
        before = self.here
        bring(self, i)
        there.append(len(mapped_under(tmp_path)))
        came.extend([i] if self.here != before else [])

    monkeypatch.setattr(LayerStream, "bring", counted)
    module = model_of(*words, LAYERS)
    assert set(there) == {1}, "while the model's way of reading is tried out, too"
    there.clear()
    came.clear()
    streamed = gradients(module)
    assert resident.keys() == streamed.keys()
    assert all(bool(grad.any()) for name, grad in resident.items() if "lora_B" in name)
    assert [name for name in resident if not torch.equal(resident[name], streamed[name])] == []
    assert set(there) == {1} and came == [0, 1, 0], "each of two layers alone: forward, and where it is recomputed if it has left"


def test_a_gradient_of_layers_that_are_not_recomputed_is_an_error() -> None:
    module = model_of("+peft=lora", LAYERS).eval()
    with torch.no_grad():
        assert module(pack()).isfinite().all()
    with pytest.raises(RunError, match="not recomputed"):
        module(pack())


def trained(out: Path, *words: str) -> dict[str, torch.Tensor]:
    posttrain.run(*words, f"run.dir={out}")
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_a_run_learns_the_same_weights_and_the_cache_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resident = trained(tmp_path / "resident", "sft", *RUN, "+peft=qlora")
    assert "come one at a time" not in capsys.readouterr().out
    assert any(bool(value.any()) for key, value in resident.items() if "lora_B" in key), "nothing was learned"
    for number in range(2):
        streamed = trained(tmp_path / str(number), "sft", *RUN, "+peft=qlora", LAYERS)
        said = capsys.readouterr().out
        assert all(torch.equal(resident[key], streamed[key]) for key in resident)
        assert "2 layers of 0.000208 GB come one at a time" in said
        assert ("are written to" in said) == (number == 0)
        assert "the base's layers are not in memory but for the one that computes (train.offload=layers)" in said
        assert json.loads((tmp_path / str(number) / "manifest.json").read_text())["offload"] == "layers"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("sft", ("+peft=dora", "quant=nf4")),
        ("cpt", ("+peft=qlora",)),
        ("dpo", ("+peft=qlora",)),
        ("rm", ("+peft=lora",)),
    ],
)
def test_a_run_that_goes_on_learns_what_a_resident_one_learns(tmp_path: Path, stage: str, words: tuple[str, ...]) -> None:
    """Of a start, a checkpoint after one step, and a second start; held-out figures and references too."""
    resident = trained(tmp_path / "resident", stage, *RUN, *words)
    assert any(bool(value.any()) for key, value in resident.items() if "lora_B" in key), "nothing was learned"
    with contextlib.suppress(Stopped):
        posttrain.run(stage, *RUN, *words, LAYERS, "run.stop_after=1", f"run.dir={tmp_path / 'streamed'}")
    streamed = trained(tmp_path / "streamed", stage, *RUN, *words, LAYERS)
    assert [key for key in resident if not torch.equal(resident[key], streamed[key])] == []
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("resident", "streamed")]
    assert manifests[0]["metrics"] == manifests[1]["metrics"]


def test_a_checkpoint_in_a_format_of_its_own_is_refused(tmp_path: Path) -> None:
    tiny = resolve("tiny", None).directory
    shutil.copytree(tiny, tmp_path / "packed")
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    cfg: Any = typed_config(compose_run("sft", [*RUN, "+peft=lora", LAYERS, f"model.name={tmp_path / 'packed'}"]))
    start = resolve_start(cfg)
    with pytest.raises(UserError, match="do not come and go; say quant=nf4"):
        check_checkpoint(cfg, start, find_base(start, None), weights=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sft",), "it is trained"),
        (("sft", "+peft=pissa"), "it is trained by pissa"),
        (("sft", "+peft=lora", "quant=int8"), "int8 do not come and go"),
        (("sft", "+peft=lora", "train.gradient_checkpointing=1"), "gradient_checkpointing=auto"),
        (("sft", "+peft=qlora", "quant.dense_layers=1"), "dense_layers=0"),
        (("sft", "+peft=lora", "train.processes=2"), "processes=1"),
        (("sft", "+peft=lora", "ewc.lambda=1"), "importance=l2"),
    ],
)
def test_what_cannot_come_and_go_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        typed_config(compose_run(words[0], [*RUN, *words[1:], LAYERS]))


@pytest.mark.parametrize("words", [("+peft=lora",), ("+peft=lora", "train.gradient_checkpointing=true"), ()])
def test_activations_come_back_with_the_same_bits(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """By copies from a CPU to itself. Of layers that are recomputed their inputs go: 48 tokens of 64 numbers in 16 or 32 bit."""
    resident = gradients(model_of(*words))
    gone: list[int] = []
    monkeypatch.setattr(activations, "SMALLEST", 0)
    send = activations._sent
    monkeypatch.setattr(activations, "_sent", lambda tensor: gone.append(tensor.nbytes) or send(tensor))
    module = model_of(*words, "train.offload=activations")
    assert all(torch.equal(resident[name], grad) for name, grad in gradients(module).items())
    assert resident
    width = module.causal.config.hidden_size * module.causal.dtype.itemsize
    assert gone.count(48 * width) >= module.num_layers
    gone.clear()
    with torch.no_grad():
        module(pack())
    assert gone == []


def test_activations_go_nowhere_from_a_cpu() -> None:
    with pytest.raises(UserError, match="in the CPU's memory already"):
        posttrain.run("sft", *RUN, "+peft=lora", "train.offload=activations")
    with pytest.raises(UserError, match="sharded"):
        typed_config(compose_run("sft", [*RUN, "+peft=lora", "train.offload=activations", "train.fsdp=true"]))
