"""A pack must give what each document gives alone: log-probs and gradients, for each family and each attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import flex_attention as flex_of_torch
from transformers import PreTrainedModel

from packs import plain_varlen
from posttrain.batch import PackedBatch, Segment
from posttrain.data import examples
from posttrain.data.collate import pack
from posttrain.errors import UserError
from posttrain.models.kernels import flex, masks, usable, varlen
from posttrain.models.kernels.attention import ATTENTION, _by_document
from posttrain.models.kernels.masks import DocumentMask, dense_mask, runs
from posttrain.models.language import reading
from posttrain.models.language.packed_lm import PackedLM

V = 61
SMALL = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict] = {
    "Llama": SMALL,
    "Qwen3": {**SMALL, "head_dim": 8},
    "Gemma3": {**SMALL, **SLIDING, "head_dim": 8},
    "Mistral": {**SMALL, "sliding_window": 5},
    "SmolLM3": {**SMALL, "no_rope_layers": [1, 0]},
    "Phi3": {**SMALL, "sliding_window": 5},
    "GPT2": {**GPT, **NO_DROPOUT},
    "GPTNeoX": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "Cohere": {**SMALL, "logit_scale": 0.25},
    "Granite": {**SMALL, "logits_scaling": 4.0},
    "Gemma2": {**SMALL, **SLIDING, "head_dim": 8, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5},
    "GptOss": {**SMALL, **SLIDING, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
SINKS_OR_SOFTCAP = {"Gemma2", "GptOss"}


def build(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(
        **{**FAMILIES[family], **changes}
    )
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
    for parameter in model.parameters():  # larger than the initialisation, so that an error shows
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
    return model


def batch_of(documents: list[list[int]], pairs: list[tuple[int, int, int]]) -> tuple[PackedBatch, list[list[int]]]:
    """Documents, then pairs (lengths of prompt, chosen, rejected) that share their prompt; and all sequences alone."""
    numbers = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, V, (n,), generator=numbers).tolist()  # noqa: E731
    tokens, positions, segments, source, target, owner, alone = [], [], [], [], [], [], []
    for document in documents:
        start = len(tokens)
        segments.append(Segment(start, start + len(document)))
        source += range(start, start + len(document) - 1)
        target += document[1:]
        owner += [len(alone)] * (len(document) - 1)
        tokens += document
        positions += range(len(document))
        alone.append(document)
    for lengths in pairs:
        prompt, start = draw(lengths[0]), len(tokens)
        segments.append(Segment(start, start + len(prompt)))
        tokens += prompt
        positions += range(len(prompt))
        for answer in (draw(lengths[1]), draw(lengths[2])):
            begin = len(tokens)
            segments.append(Segment(begin, begin + len(answer), start, start + len(prompt)))
            source += [start + len(prompt) - 1, *range(begin, begin + len(answer) - 1)]
            target += answer
            owner += [len(alone)] * len(answer)
            tokens += answer
            positions += range(len(prompt), len(prompt) + len(answer))
            alone.append(prompt + answer)
    n = len(source)
    batch = PackedBatch(
        torch.tensor([tokens]), torch.tensor([positions]), tuple(segments), torch.tensor(source), torch.tensor(target),
        torch.ones(n), torch.tensor(owner), torch.zeros(0, dtype=torch.int64), len(alone), tuple(range(len(alone))), float(n),
    )  # fmt: skip
    return batch, alone


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("attention", ["documents", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_equals_its_documents_alone(family: str, attention: str) -> None:
    model = build(family)
    if attention == "documents" and family in SINKS_OR_SOFTCAP:
        why = r"model\.attention: \w+ cannot be packed by documents: documents cannot compute its softcap or sinks"
        with pytest.raises(UserError, match=why):
            PackedLM(model, attention)
        return
    batch, alone = batch_of([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15]], [(9, 4, 6), (2, 3, 1)])
    chooses = torch.randn(len(batch.logit_index), generator=torch.Generator().manual_seed(2))
    wanted = []
    for k, sequence in enumerate(alone):
        logps = model(input_ids=torch.tensor([sequence])).logits[0].float().log_softmax(-1)
        count = int((batch.sequence_id == k).sum())
        wanted.append(logps[-count - 1 : -1].gather(1, torch.tensor(sequence[-count:])[:, None])[:, 0])
    (torch.cat(wanted) * chooses).sum().backward()
    want = gradients(model)
    lm = PackedLM(model, attention).train()
    got = lm(batch)
    torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=1e-5)
    (got * chooses).sum().backward()
    have = gradients(model)
    assert have.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(have[name], gradient, rtol=1e-4, atol=1e-5 * max(1.0, float(gradient.abs().max())), msg=name)


@pytest.mark.parametrize(("attention", "packing"), [("documents", "auto"), ("dense", "auto"), ("auto", False)])
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2"])
def test_turns_that_share_their_beginning_equal_each_alone(family: str, attention: str, packing: Any) -> None:
    """A row's turns as examples of their own: loss and gradients, shared or not, in packs and one a row."""
    words = torch.randint(3, V, (30,), generator=torch.Generator().manual_seed(3)).tolist()
    long, thought = words[:24], words[24:]
    rows = [([*long[:6], *thought, *long[6:9]], 6), ([*long[:15], *thought[:2], *long[15:17]], 15), (long, 20)]
    found = examples.build([(ids, [float(k >= first) for k in range(len(ids))], 1) for ids, first in rows])
    shared, model = examples.by_row(found, 100), build(family)
    assert shared.shared.tolist() == [6, 15, 0] and shared.unit_tokens().tolist() == [24 + 9 + 4]
    lm, losses, found_gradients = PackedLM(model, attention, packing=packing).train(), [], []
    for batch in (pack(found, [0, 1, 2]), pack(shared, [0])):
        loss = -(batch.weight * lm(batch)).sum() / batch.loss_denominator
        loss.backward()
        losses.append(float(loss.detach()))
        found_gradients.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, gradient in found_gradients[0].items():
        torch.testing.assert_close(
            found_gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * max(1.0, float(gradient.abs().max()))
        )


def test_recomputing_activations_changes_nothing() -> None:
    batch, _ = batch_of([[5, 6, 7, 8]], [(4, 2, 3)])
    results = []
    for recompute in (False, True):
        model = build("Llama")
        lm = PackedLM(model, "documents").train()
        if recompute:
            lm.recompute(1)
        lm(batch).sum().backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient)


def test_generation_after_packing_is_plain_generation() -> None:
    model: Any = build("Llama").eval()
    prompt = torch.tensor([[5, 6, 7], [0, 8, 9]])
    ask = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(prompt, **ask)
    PackedLM(model, "documents")
    assert torch.equal(model.generate(prompt, **ask), plain)


def test_dense_mask_by_hand() -> None:
    # one document of 2, then a prompt of 2 with two answers of 1 and 2
    segments = (Segment(0, 2), Segment(2, 4), Segment(4, 5, 2, 4), Segment(5, 7, 2, 4))
    rows = ["1......", "11.....", "..1....", "..11...", "..111..", "..11.1.", "..11.11"]
    assert dense_mask(segments, 7).tolist() == [[c == "1" for c in row] for row in rows]
    narrow = ["1......", "11.....", "..1....", "..11...", "...11..", "...1.1.", ".....11"]
    assert dense_mask(segments, 7, window=2).tolist() == [[c == "1" for c in row] for row in narrow]


def test_runs_by_hand() -> None:
    """Short documents side by side up to 128 tokens; a prompt is never cut from its answers."""
    short, long = [Segment(0, 60), Segment(60, 120), Segment(120, 170)], [Segment(170, 500)]
    pair = [Segment(500, 540), Segment(540, 600, 500, 540), Segment(600, 660, 500, 540), Segment(660, 670)]
    found = runs([*short, *long, *pair])
    assert [run.length for run in found] == [120, 50, 330, 160, 10]
    assert found[0].segments == (Segment(0, 60), Segment(60, 120))
    assert found[3].segments == (Segment(0, 40), Segment(40, 100, 0, 40), Segment(100, 160, 0, 40))


def test_bands_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a document of 2, and a prompt of 2 with answers of 1 and 2: what a band does not see is left out, also in the middle."""
    monkeypatch.setattr(masks, "BAND", 2)
    found = masks.bands(dense_mask((Segment(0, 2), Segment(2, 4), Segment(4, 5, 2, 4), Segment(5, 7, 2, 4)), 7))
    assert [band.rows for band in found] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    assert [band.columns for band in found] == [(slice(0, 2),), (slice(2, 4),), (slice(2, 6),), (slice(2, 4), slice(5, 7))]
    no = -torch.inf
    assert [band.bias.tolist() for band in found[1:]] == [[[0, no], [0, 0]], [[0, 0, 0, no], [0, 0, no, 0]], [[0, 0, 0, 0]]]


@pytest.mark.parametrize("window", [None, 7, 200])
@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-6), (torch.bfloat16, 0.01)])
def test_scores_written_out_give_what_the_dense_mask_gives(
    window: int | None, memory: int, dtype: torch.dtype, within: float
) -> None:
    """Output and gradients of three runs against all scores of the pack in float64; float64 goes the way of half precision.
    The last is a long prompt with two answers, the second of which lies two bands away from it."""
    segments = (
        Segment(0, 50), Segment(50, 90), Segment(90, 100, 50, 90), Segment(100, 120, 50, 90), Segment(120, 260),
        Segment(260, 460), Segment(460, 760, 260, 460), Segment(760, 860, 260, 460),
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = ((6, 0, 8), (2, memory, 8), (2, memory, 5))
    heads = [torch.randn(1, n, 860 + m, d, dtype=dtype, requires_grad=True) for n, m, d in sizes]
    mask = DocumentMask(
        segments, 860, torch.device("cpu"), [(heads[1][:, :, :memory], heads[2][:, :, :memory])] if memory else ()
    )
    assert [run.length for run in mask.runs] == [120, 140, 600]
    exact = [x.detach().double().requires_grad_() for x in heads]
    groups = [x.repeat_interleave(3, dim=1) for x in exact[1:]]
    scores = (exact[0] @ groups[0].transpose(2, 3) * 0.3).masked_fill(~dense_mask(segments, 860, window, memory), -torch.inf)
    want = scores.softmax(-1) @ groups[1]
    got = _by_document(heads[0], heads[1], heads[2], mask, dropout=0.0, scaling=0.3, window=window)
    chooses = torch.randn_like(want)
    needed = torch.autograd.grad((want * chooses).sum(), exact)
    had = torch.autograd.grad((got * chooses.to(dtype)).sum(), heads)
    for have, need in zip((got, *had), (want, *needed), strict=True):
        assert (have.double() - need).norm() <= within * need.norm()


def test_a_pad_token_still_gets_its_gradient(tmp_path) -> None:
    from posttrain.models.language.pretrained import load_causal
    from posttrain.models.language.tokenizer import load_tokenizer

    directory = tmp_path / "base"
    build("Llama", pad_token_id=5, tie_word_embeddings=False).save_pretrained(directory)
    load_tokenizer("tiny", None, None, None).save_pretrained(directory)
    model = load_causal(str(directory), None, "float32", "cpu", None, None)
    PackedLM(model, "documents")(batch_of([[5, 6, 7]], [])[0]).sum().backward()
    embeddings: Any = model.get_input_embeddings()
    assert float(embeddings.weight.grad[5].abs().sum()) > 0


def test_attention_that_ignores_the_pack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama")
    whole = DocumentMask.__init__

    def one_document(self, segments, num_tokens, device):
        whole(self, (Segment(0, num_tokens),), num_tokens, device)

    monkeypatch.setattr(DocumentMask, "__init__", one_document)
    with pytest.raises(UserError, match="documents would see one another"):
        PackedLM(model, packing=True)


def test_a_wrong_head_is_refused() -> None:
    model = build("Granite")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * forward(hidden)
    with pytest.raises(UserError, match=r"model\.name: GraniteForCausalLM cannot be trained here: .*the head.*KL"):
        PackedLM(model)


def test_the_check_leaves_random_numbers_and_mode_alone() -> None:
    model = build("GPT2").train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lm = PackedLM(model, "documents")
    assert torch.equal(torch.get_rng_state(), before)
    assert lm.training and model.training


class Card(NamedTuple):
    """A CUDA device that is not there: its kernels are torch's eager operator and varlen's documented semantics."""

    monkeypatch: pytest.MonkeyPatch
    compiles: bool = True

    def insert(self) -> None:
        self.monkeypatch.setattr(reading, "ways_of_attention", lambda asked, _: tuple(ATTENTION) if asked == "auto" else (asked,))
        self.monkeypatch.setattr(usable, "card_of", lambda _: usable.Card((9, 0), self.compiles))
        self.monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
        self.monkeypatch.setattr(flex_of_torch, "_validate_device", lambda *_: None)
        self.monkeypatch.setattr(flex, "compiled", lambda: flex_of_torch.flex_attention)
        usable._tried.cache_clear()


NO_SOFTCAP = "{} cannot compute its softcap or sinks"
NO_COMPILER = "flex needs Triton and a C compiler (gcc, or CC=...), which are not here"
NEITHER = f"{NO_SOFTCAP.format('varlen')}; {NO_COMPILER}; {NO_SOFTCAP.format('documents')}"


@pytest.mark.parametrize(
    ("family", "dtype", "compiles", "taken", "why"),
    [
        ("Llama", torch.bfloat16, True, "varlen", ""),
        ("Mistral", torch.bfloat16, False, "varlen", ""),
        ("GptOss", torch.float32, True, "flex", NO_SOFTCAP.format("varlen")),
        (
            "Gemma2",
            torch.float32,
            False,
            "dense",
            NEITHER,
        ),
        ("Qwen3", torch.float32, False, "documents", f"varlen computes in 16 bits, and the model in float32; {NO_COMPILER}"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_on_a_card_a_pack_goes_by_the_first_kernel_that_can(
    family: str, dtype: torch.dtype, compiles: bool, taken: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and gradients are those of the dense way, and what was passed over is said in one line."""
    batch, _ = batch_of([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15]], [(9, 4, 6), (2, 3, 1)])
    found = []
    for attention in ("dense", "auto"):
        if attention == "auto":
            Card(monkeypatch, compiles).insert()
        model: Any = build(family)
        model.to(dtype)
        lm = PackedLM(model, attention).train()
        logps = lm(batch)
        logps.sum().backward()
        found.append((logps.detach(), gradients(model)))
    assert (lm.reading.attention, lm.reading.why) == (taken, why)
    assert lm.reading.line == (f"attention is computed by {taken} (model.attention=auto): {why}" if why else "")
    within = 1e-5 if dtype == torch.float32 else 0.05
    (want, wanted), (got, had) = found
    assert (got - want).norm() <= within * want.norm()
    for name, gradient in wanted.items():
        assert (had[name] - gradient).norm() <= 2 * within * gradient.norm() + 1e-6, name
