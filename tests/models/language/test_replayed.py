"""Answers whose every token is a recorded step are those of the growing cache, and models of which it is not so keep that one.

torch.cuda's graphs have a stand-in (tests/devices/graphs.py): operators done again on the same tensors, without Python.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.devices.graphs import Graph, stand_in
from tests.models.kernels.test_fused import SHAPE, with_lora
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from posttrain.devices.host_waits import HostWaits
from posttrain.models.language import growing, replayed
from posttrain.models.language.drawing import Step
from posttrain.models.language.generation import Answer, Sampling, sample
from posttrain.models.language.growing import FixedAnswers, growing_answers
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.replayed import KERNEL, Replayed
from posttrain.models.quantization import keep_as_quantized

PROMPTS = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 13, 4, 9, 8)]
CUT = Sampling(14, 0.7, 0.9, 0, 9)
SEEDS, ENDS = [3, 1, 4, 1, 5], list(range(14))
NO_KV: dict[str, Any] = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
GEMMA3N: dict[str, Any] = SHAPE | {
    "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 6, "vocab_size_per_layer_input": 97, "laurel_rank": 8,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
BY_TURNS: dict[str, Any] = {"experts_implementation": "eager"}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma": GemmaConfig(**SHAPE, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**NO_KV),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=6),
    "gemma2: window, softcap": Gemma2Config(**SHAPE, sliding_window=6, head_dim=16),
    "gemma3: some layers with a window": Gemma3TextConfig(**SHAPE, sliding_window=6, head_dim=16),
    "gemma3n: layers that share keys": Gemma3nTextConfig(**GEMMA3N),
    "gpt-oss: window, sinks": GptOssConfig(**SHAPE, sliding_window=6, head_dim=16, num_local_experts=4),
    "mixtral: experts at once": MixtralConfig(**SHAPE, num_local_experts=4),
}
OTHERS = {
    "lfm2: layers with a state": (
        Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
        "it does not read prompts as a pack",
    ),
    "mixtral: experts by turns": (
        MixtralConfig(**SHAPE, num_local_experts=4, **BY_TURNS),
        "its step waits for the device (aten._local_scalar_dense.default)",
    ),
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    monkeypatch.setattr(replayed, "records", lambda _: True)
    monkeypatch.setattr(growing, "ROOM", 1)
    return stand_in(monkeypatch)


def enlarged(model: Any) -> PackedLM:
    """Far from even chances."""
    for name, parameter in model.named_parameters():
        parameter.data *= 1 if "lora" in name else 2
    return PackedLM(model)


def model_of(config: Any) -> PackedLM:
    torch.manual_seed(0)
    return enlarged(AutoModelForCausalLM.from_config(config))


def written(lm: PackedLM, **cut: Any) -> list[Answer]:
    how = {"top_p": 1.0, "top_k": 0, **cut}
    return list(chain(*sample(lm, PROMPTS, 3, Sampling(max_new_tokens=14, temperature=0.7, at_once=9, **how), ENDS, SEEDS)))


def without(lm: PackedLM) -> list[Answer]:
    """As `written`, by the growing cache."""
    lm.replays = False
    try:
        return written(lm)
    finally:
        lm.replays = None


def assert_alike(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens and one.ended == other.ended
        assert one.logps == pytest.approx(other.logps, abs=1e-4) and one.entropy == pytest.approx(other.entropy, abs=1e-4)


@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.8}])
@pytest.mark.parametrize("family", [*FAMILIES, "llama with LoRA"])
def test_answers_are_those_of_the_growing_cache(family: str, cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths; answers end at different steps, rows are dropped, and the room is filled twice."""
    lm = enlarged(with_lora(FAMILIES["llama"])) if family not in FAMILIES else model_of(FAMILIES[family])
    expected = written(lm, **cut)
    monkeypatch.setattr(replayed, "records", lambda _: True)
    monkeypatch.setattr(growing, "ROOM", 1)
    graphs = stand_in(monkeypatch)
    assert_alike(written(lm, **cut), expected)
    assert len({len(answer.tokens) for answer in expected}) > 3
    assert lm.report.taken[KERNEL] == 1 and lm.report.warning == ""
    assert len(graphs) > 3 and sum(graph.replays for graph in graphs) > 7
    tried = len(graphs)
    assert_alike(written(lm, **cut), expected)
    assert len(graphs) == 2 * tried - 1  # the first was the model's try


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_keep_the_growing_cache_with_a_line(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, why = OTHERS[family]
    lm = model_of(config)
    expected = written(lm)
    monkeypatch.setattr(replayed, "records", lambda _: True)
    graphs = stand_in(monkeypatch)
    capsys.readouterr()
    for _ in range(2):
        assert_alike(written(lm), expected)
    said, kind = capsys.readouterr().out, type(lm.causal).__name__
    assert said.count(f"{KERNEL} of 1 {kind} ({why})") == 1
    assert not graphs and {"kernel": KERNEL, "module": kind, "modules": 1, "why": why} in lm.report.record()["left"]


def test_stop_texts_and_random_numbers_of_torch(graphs: list[Graph]) -> None:
    """One answer, so that no row is dropped: the numbers are the same then."""
    lm = model_of(FAMILIES["llama"])
    sampling = Sampling(20, 1.0, 1.0, 0, 32, ("ba", "h"), lambda tokens: "".join("abcdefgh"[token % 8] for token in tokens))
    lm.replays = False
    torch.manual_seed(5)
    expected = sample(lm, [[1, 2]], 1, sampling, [96])
    lm.replays = None
    torch.manual_seed(5)
    assert_alike(sample(lm, [[1, 2]], 1, sampling, [96])[0], expected[0])
    assert expected[0][0].ended and graphs


def test_a_step_stays_with_its_tensors_and_asks_nothing_of_the_device(graphs: list[Graph]) -> None:
    """Until its room is full: a prompt of 13 and five tokens, in room for 16 and then 24."""
    lm, places = model_of(FAMILIES["gemma3: some layers with a window"]).eval(), list[tuple[int, ...]]()
    answers = growing_answers(lm, PROMPTS, 1, fixed=True)
    assert isinstance(answers, FixedAnswers)
    step, tokens = Step(lm, answers, CUT), torch.arange(5)[:, None]
    for _ in range(5):
        answers.ready()
        with torch.no_grad(), HostWaits() as waits:
            step(tokens, torch.rand(5, 1, dtype=torch.float64))
        assert waits.found == []
        layers = [x for layer in answers.cache.layers for x in (layer.keys, layer.values)]
        places.append(tuple(x.data_ptr() for x in (answers.mask, answers.positions, answers.place, *layers)))
    assert len(set(places[:3])) == len(set(places[3:])) == 1 and places[3] != places[0]
    assert answers.made == 2 and answers.mask.shape == (5, 1, 1, 24)
    assert answers.positions.tolist() == [6, 18, 9, 14, 13] and answers.place.tolist() == [18]


class Calls(TorchDispatchMode):
    """How many operators are called inside, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_host_starts_a_replayed_step_by_three_calls(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them bring tokens and random numbers; a growing step of as few as two layers is more than a hundred. What it gives
    is always in the same place."""
    monkeypatch.setattr(growing, "ROOM", 8)
    lm = model_of(FAMILIES["llama"]).eval()
    given = torch.arange(5)[:, None], torch.rand(5, 1, dtype=torch.float64)
    answers = growing_answers(lm, PROMPTS, 1, fixed=True)
    assert isinstance(answers, FixedAnswers)
    lm.replays, step = True, Replayed(lm, answers, CUT)
    places = [step(*given).figures.data_ptr() for _ in range(3)]
    assert places[0] != places[1] == places[2]
    started: list[Graph] = []
    monkeypatch.setattr(Graph, "replay", lambda self: started.append(self))
    with Calls() as replayed_calls:
        step(*given)
    plain = Step(lm, growing_answers(lm, PROMPTS, 1), CUT)
    with Calls() as growing_calls:
        plain(*given)
    assert replayed_calls.count == 2 and len(started) == 1 and growing_calls.count > 100


def test_what_python_alone_changes_is_seen_in_the_try(graphs: list[Graph], capsys: pytest.CaptureFixture[str]) -> None:
    """A model that counts its calls, which no recording knows of."""
    lm, calls = model_of(FAMILIES["llama"]), list[int]()

    def count(module: Any, given: Any, out: Any) -> Any:
        calls.append(1)
        return out * (1 + 0.5 * (len(calls) % 2))

    lm.causal.get_input_embeddings().register_forward_hook(count)
    with torch.no_grad():
        assert not replayed.replays(lm.eval(), CUT)
    assert "it gives other chances (KL " in capsys.readouterr().out


def test_a_recording_that_fails_is_given_up_with_one_line(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers that are on their way are written to their end, and the next ones with the growing cache."""
    lm = model_of(FAMILIES["llama"])
    expected, own, asked = without(lm), torch.cuda.graph, list[int]()

    def graph(*given: Any, **how: Any) -> Any:
        asked.append(1)
        if len(asked) > 2:  # the try's, and one
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return own(*given, **how)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    for _ in range(2):
        assert_alike(written(lm), expected)
    why = "CUDA does not record it: CUDA error: operation not permitted when stream is capturing"
    assert capsys.readouterr().out.count(why) == 1 and len(asked) == 3
    assert KERNEL not in lm.report.taken and why in lm.report.warning


def test_out_of_memory_while_recording_is_in_halves(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    lm, own, asked = model_of(FAMILIES["llama"]), torch.cuda.graph, list[int]()
    expected = without(lm)

    def graph(*given: Any, **how: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return own(*given, **how)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    assert_alike(written(lm), expected)
    assert lm.replays and len(asked) > 4


def test_with_autocast_it_is_left_out(graphs: list[Graph]) -> None:
    """Which keeps copies of weights that a recording would make its own."""
    lm = model_of(FAMILIES["llama"])
    with torch.autocast("cpu", torch.bfloat16):
        assert not replayed.replays(lm, CUT)
    assert "autocast is on" in lm.report.warning


def test_a_base_in_four_bits_with_lora(graphs: list[Graph], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options, dtype=torch.float32, device_map="cpu")
    keep_as_quantized(base)
    lm = PackedLM(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    expected = without(lm)
    assert_alike(written(lm), expected)
    assert lm.report.taken[KERNEL] == 1 and any("bitsandbytes" in str(func) for func, *_ in graphs[-1].calls)
