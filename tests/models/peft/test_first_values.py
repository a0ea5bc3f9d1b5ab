"""First values from rows and from what quantizing has lost: peft's own numbers on the same data, the base at the start where the
papers say so, and the whole change in plain peft at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils import loftq_utils
from tests.models.peft.test_methods import load, logits, make, trained
from tests.models.peft.written import assert_written_is_live

from posttrain.batch import PackedBatch
from posttrain.config.compose import compose_run, validate
from posttrain.data.collate import pack
from posttrain.data.examples import build
from posttrain.errors import UserError
from posttrain.models.language.objectives import TOKENS
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import NEW, add_method
from posttrain.models.peft.export import export_adapter, lora_layers
from posttrain.models.peft.first_values import Given
from posttrain.models.quantization import quantizer_of

TARGETS = {"q_proj", "down_proj"}
ROWS = [torch.randint(31, (40,), generator=torch.Generator().manual_seed(k)).tolist() for k in range(4)]
COUNTS = [0.0] * 8 + [1.0] * 32  # the first eight are a prompt
PLAIN: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS}


def method(init: str, *more: str) -> Any:
    words = ["peft=lora", "peft.r=2", "peft.alpha=8", f"peft.init={init}", "peft.targets=[q_proj,down_proj]", *more]
    return validate(compose_run("sft", words)).peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make("llama").save_pretrained(folder)
    return folder


def batches(together: int) -> list[PackedBatch]:
    examples = build([(row, COUNTS, k) for k, row in enumerate(ROWS)])
    return [pack(examples, range(k, k + together)) for k in range(0, len(ROWS), together)]


def given(model: Any, together: int = 1, quant: str = "none", original: Any = lambda name: None) -> Given:
    lm = PackedLM(model, kernels="reference")
    loss: Callable[[PackedBatch], Any] = lambda batch: TOKENS.loss(lm, batch).total  # noqa: E731
    return Given(batches(together), lm, loss, original, quantizer_of({"method": quant}))


def begun(model: Any, kind: Any, found: Given) -> Any:
    torch.manual_seed(3)
    values = kind.first_values(model, found)
    made = add_method(model, kind, 10)
    kind.begin(made, values)
    return made


def of(model: Any) -> dict[str, torch.Tensor]:
    """Of every layer A, B and the weight of the base."""
    found = {}
    for name, layer in lora_layers(model).items():
        found |= {f"{name}.A": layer.lora_A[NEW].weight, f"{name}.B": layer.lora_B[NEW].weight}
        found[f"{name}.W"] = layer.get_base_layer().weight
    return found


def assert_alike(ours: Any, theirs: Any, atol: float = 2e-5) -> None:
    one, two = of(ours), of(theirs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def ids_of(row: list[int]) -> torch.Tensor:
    return torch.tensor([row])


def test_corda_is_pefts_own() -> None:
    model, config = make("llama"), LoraConfig(**PLAIN, init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(model, config, lambda: [model(ids_of(row)) for row in ROWS])  # pyright: ignore[reportArgumentType]
    ours = begun(base_model := make("llama"), method("corda"), given(base_model))
    assert_alike(ours, get_peft_model(model, config))


def test_lora_ga_is_pefts_own_with_the_gradient_of_the_mean_loss() -> None:
    model = make("llama")
    config = LoraConfig(**PLAIN, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())  # pyright: ignore

    def step() -> None:
        """peft divides by four, for there are four documents."""
        for row in ROWS:
            logps = torch.log_softmax(model(ids_of(row)).logits[0], -1)
            (-sum(logps[t - 1, row[t]] for t in range(8, 40)) / 32).backward()  # pyright: ignore

    with warnings.catch_warnings(action="ignore"):
        preprocess_loraga(model, config, step)
    torch.manual_seed(3)
    theirs = get_peft_model(model, config)
    ours = begun(packed := make("llama"), method("lora_ga"), given(packed, together=2))
    for name, layer in lora_layers(ours).items():  # singular vectors have no sign
        other = lora_layers(theirs)[name]
        for half in ("lora_A", "lora_B"):
            one, two = (getattr(each, half)[NEW].weight for each in (layer, other))
            torch.testing.assert_close(one.abs(), two.abs(), rtol=0, atol=1e-3)
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "lora_" not in n)


def test_eva_is_pefts_own_on_the_tokens_that_count() -> None:
    from peft import initialize_lora_eva_weights

    config = LoraConfig(**PLAIN, init_lora_weights="eva", eva_config=EvaConfig())
    theirs: Any = get_peft_model(make("llama"), config, low_cpu_mem_usage=True)
    labels = torch.tensor([[-100] * 7 + [1] * 32 + [-100]])  # at the places that predict a token which counts
    data = [{"input_ids": ids_of(row), "labels": labels} for row in ROWS]
    initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    kind = method("eva")
    ours = begun(base_model := make("llama"), kind, given(base_model))
    assert_alike(ours, theirs)
    ranks = kind.record(ours)["ranks"]
    assert sum(ranks.values()) == 4 * 2 and len(set(ranks.values())) > 1 and max(ranks.values()) <= 4
    assert {layer.scaling[NEW] for layer in lora_layers(ours).values()} == {4.0}


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_the_base_at_the_start_and_the_whole_change_at_the_end(base: Path, init: str, tmp_path: Path) -> None:
    bare, model = logits(load(base)), load(base)
    made = begun(model, method(init), given(model, together=2))
    torch.testing.assert_close(logits(made), bare, rtol=0, atol=2e-5)
    trained(made)
    assert (logits(made) - bare).abs().max() > 1e-3
    assert_written_is_live(made, base, tmp_path, 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_weights_that_are_kept_transposed(init: str) -> None:
    words = ["peft=lora", "peft.r=2", f"peft.init={init}", "peft.targets=[c_attn,c_fc]"]
    bare, model = logits(make("gpt2")), make("gpt2")
    made = begun(model, validate(compose_run("sft", words)).peft, given(model, together=2))
    torch.testing.assert_close(logits(made), bare, rtol=0, atol=2e-5)
    for layer in lora_layers(made).values():
        assert bool(layer.lora_B[NEW].weight.any()) == (init != "eva")


class OnCpu:
    """A weight for peft's LoftQ, which moves it to a GPU whatever there is."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def to(self, **_: Any) -> torch.Tensor:
        return self.weight


def quantized(base: Path, quant: str, kind: Any) -> Any:
    model, plain = load(base, quant), load(base)
    return begun(model, kind, given(model, 1, quant, lambda name: plain.get_submodule(name).weight.detach()))


def test_loftq_is_pefts_own_and_the_adapter_carries_it(base: Path, tmp_path: Path) -> None:
    made = quantized(base, "nf4", method("loftq", "quant=nf4", "peft.alpha=2"))
    plain = load(base)
    for name, layer in lora_layers(made).items():
        a, b = loftq_utils._loftq_init_new(layer.weight, OnCpu(plain.get_submodule(name).weight.detach()), 4, 2)  # pyright: ignore
        torch.testing.assert_close(layer.lora_A[NEW].weight, a, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.lora_B[NEW].weight, b, rtol=0, atol=1e-6)
    trained(made)
    live = logits(made)
    export_adapter(made, tmp_path, str(base))
    again = PeftModel.from_pretrained(load(base, "nf4"), str(tmp_path))
    torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_loftq_begins_nearer_to_the_base_whatever_the_scale(base: Path, quant: str) -> None:
    """The nearest of rank 16 to what is lost: what is left of it is the smaller singular values, at alpha 32 too."""
    plain = load(base)
    kind = method("loftq", f"quant={quant}", "peft.r=16", "peft.alpha=32")
    made, quantizer = quantized(base, quant, kind), quantizer_of({"method": quant})
    for name, layer in lora_layers(made).items():
        lost = plain.get_submodule(name).weight.detach() - quantizer.dequantized(layer.get_base_layer()).float()
        change = layer.scaling[NEW] * layer.lora_B[NEW].weight @ layer.lora_A[NEW].weight
        left = torch.linalg.svdvals(lost)[16:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.matrix_norm(lost - change), left, rtol=1e-3, atol=1e-5)
    if quant == "nf4":  # the products of int8 round their inputs too, which is more than the weights lose
        bare = logits(plain)
        assert (logits(made) - bare).abs().mean() < (logits(load(base, quant)) - bare).abs().mean()


def test_eva_says_what_is_too_little() -> None:
    with pytest.raises(
        UserError, match=r"^peft.init: eva looks for 64 directions .* has 32 tokens that count; give a larger train"
    ):
        begun(model := make("llama"), method("eva", "peft.r=32", "peft.targets=[down_proj]"), given(model))


@pytest.mark.parametrize(
    ("stage", "words", "why"),
    [
        ("ppo", ("peft.init=eva",), "begins by the run's rows, as they go through its layers, which ppo does not give"),
        (
            "dpo",
            ("peft.init=lora_ga",),
            "begins by the gradient of a loss of single rows, which dpo does not give; say peft.init",
        ),
        ("rm", ("peft.init=lora_ga",), "begins by the gradient of a loss of single rows, which rm does not give; say peft.init"),
        ("dreambooth", ("peft.init=loftq", "quant=nf4"), "what quantizing the base has lost, which dreambooth does not give"),
        (
            "sft",
            ("peft.init=loftq",),
            "peft.init: loftq makes up for what quantizing the base has lost, and quant=none; say quant=nf4",
        ),
        ("sft", ("peft.init=corda", "quant=nf4"), "quant=nf4 cannot be trained by lora with peft.init=corda, which writes into"),
        ("sft", ("peft.init=lora_ga", "quant=int8"), "quant=int8 cannot be trained by lora with peft.init=lora_ga, which writes"),
        (
            "sft",
            ("peft.init=eva", "train.fsdp=true"),
            "train.fsdp: a base that is sharded is not read before it is trained by lora",
        ),
        (
            "sft",
            ("peft.init=eva", "quant=nf4", "train.offload=layers"),
            "are not there when it is trained by lora with peft.init",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_the_config(stage: str, words: tuple[str, ...], why: str) -> None:
    needed = {"ppo": ["reward.function=length"], "dreambooth": ["data.instance_dir=a", "data.instance_prompt=b"]}
    with pytest.raises(UserError) as error:
        validate(compose_run(stage, ["peft=lora", *words, *needed.get(stage, [])]))
    assert why in str(error.value)


def test_layers_are_as_wide_as_the_directions_that_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """32 is the width of the keys, and 64 that of the model: eva and lora_ga look for twice the rank."""
    words = ["peft=lora", "peft.init=eva", "peft.targets=[q_proj,k_proj]"]
    for r, said in ((32, "no adapter on 2 linear layers (k_proj): narrower than 2 times the rank 32"), (16, "")):
        made = add_method(make("llama"), validate(compose_run("sft", [*words, f"peft.r={r}"])).peft, 10)
        assert len(lora_layers(made)) == (2 if said else 4) and said in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"^peft.r: 33 is above 1/2 of the smaller side of every layer .*; 32 is the highest$"):
        add_method(make("llama"), validate(compose_run("sft", [*words, "peft.r=33"])).peft, 10)
