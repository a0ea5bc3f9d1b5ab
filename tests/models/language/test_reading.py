"""How packs are read: whatever way a model goes, each document has what it has alone, in values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tests.models.language.test_packed_lm import SMALL, V, batch_of, build, gradients
from torch import Tensor

from posttrain.batch import Segment
from posttrain.errors import UserError
from posttrain.models.kernels.documents import documents, end_to_end, in_rows
from posttrain.models.kernels.logprobs import head_of
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.precision import in_float32
from posttrain.models.language.reading import lengths_border
from posttrain.models.layers import Kind, layers_of

CPU = torch.device("cpu")
PLAIN = {k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
IN_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {**PLAIN, "state_size": 4}),
    "mamba2": ("Mamba2", {**PLAIN, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "rwkv": ("Rwkv", PLAIN),
    "qwen3_next": ("Qwen3Next", {**SMALL, **LINEAR, **MOE}),
    "lfm2": ("Lfm2", {**SMALL, "layer_types": ["conv", "full_attention"]}),
    "bloom, whose positions are a bias": ("Bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo, whose attention cannot be exchanged": (
        "GPTNeo",
        {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "llama4, attention in chunks": ("Llama4Text", {**SMALL, "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2}),
}


def tiny(name: str) -> Any:
    kind, settings = IN_ROWS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    for key in [k for k, value in vars(config).items() if ("drop" in k) and isinstance(value, float)]:
        setattr(config, key, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def alone(model: Any, batch: Any, sequences: list[list[int]]) -> Tensor:
    found = []
    for k, sequence in enumerate(sequences):
        logps = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].float().log_softmax(-1)
        count = int((batch.sequence_id == k).sum())
        found.append(logps[-count - 1 : -1].gather(1, torch.tensor(sequence[-count:])[:, None])[:, 0])
    return torch.cat(found)


def assert_alike(model: Any, lm: PackedLM, within: float = 1e-5) -> None:
    """Log-probs of a pack of documents and pairs, and all gradients, are those of each sequence by itself."""
    batch, sequences = batch_of([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15]], [(9, 4, 6), (2, 3, 1)])
    chooses = torch.randn(len(batch.logit_index), generator=torch.Generator().manual_seed(2))
    lm.train()
    got = lm(batch)
    (got * chooses).sum().backward()
    have = gradients(model)
    model.set_attn_implementation(lm.own_attention)
    want = alone(model, batch, sequences)
    (want * chooses).sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=within)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(have[name], gradient, rtol=1e-4, atol=within * max(1.0, float(gradient.abs().max())), msg=name)


@pytest.mark.parametrize("name", IN_ROWS)
def test_a_model_that_cannot_pack_reads_one_document_a_row(name: str) -> None:
    model = tiny(name)
    lm = PackedLM(model)
    assert (lm.reading.way, lm.reading.attention) == ("rows", "")
    assert "one document a row (train.packing=auto): " in lm.reading.line
    assert_alike(model, lm)


@pytest.mark.parametrize("name", ["mamba", "bloom, whose positions are a bias", "llama4, attention in chunks"])
def test_packing_that_is_asked_for_and_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^train\.packing: \w+ cannot be packed: .*; say train\.packing=auto$"):
        PackedLM(tiny(name), packing=True)


def test_packing_can_be_forbidden() -> None:
    model = build("Llama")
    lm = PackedLM(model, packing=False)
    assert lm.reading.way == "rows" and not lm.reading.line
    assert_alike(model, lm)


def test_attention_by_itself_takes_what_can_compute_the_model() -> None:
    """Softcap (Gemma 2) and sinks (gpt-oss) need all scores; a plain model does not."""
    found = {family: PackedLM(build(family)).reading for family in ("Llama", "Gemma2", "GptOss")}
    assert {family: (each.way, each.attention) for family, each in found.items()} == {
        "Llama": ("packed", "documents"), "Gemma2": ("packed", "dense"), "GptOss": ("packed", "dense"),
    }  # fmt: skip
    assert found["Llama"].line == ""
    line = "attention is computed by dense (model.attention=auto): documents cannot compute its softcap or sinks"
    assert found["Gemma2"].line == line


def test_documents_by_hand() -> None:
    """One of 2 tokens, then a prompt of 2 with answers of 1 and 2: the answers' prompt is no document by itself."""
    segments = (Segment(0, 2), Segment(2, 4), Segment(4, 5, 2, 4), Segment(5, 7, 2, 4))
    assert documents(segments) == [[0, 1], [2, 3, 4], [2, 3, 5, 6]]
    one = in_rows(segments, CPU, at_once=True)
    assert [rows.places.tolist() for rows in one.rows] == [[[0, 1, 0, 0], [2, 3, 4, 0], [2, 3, 5, 6]]]
    assert one.rows[0].real.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]] and one.rows[0].padded
    assert one.home.tolist() == [0, 1, 4, 5, 6, 10, 11]
    # 4 + 3 tokens in 8 places are little padding, with the 2 of another document it would be much
    some = in_rows(segments, CPU)
    assert [rows.places.tolist() for rows in some.rows] == [[[2, 3, 4, 0], [2, 3, 5, 6]], [[0, 1]]]
    assert some.home.tolist() == [8, 9, 0, 1, 2, 6, 7]
    border = in_rows(segments, CPU, alone_beyond=3)
    assert [rows.places.tolist() for rows in border.rows] == [[[2, 3, 5, 6]], [[0, 1, 0], [2, 3, 4]]]
    layout, laid = end_to_end(segments, CPU)
    assert layout.rows[0].places.tolist() == [[0, 1, 2, 3, 4, 2, 3, 5, 6]]
    assert laid == (Segment(0, 2), Segment(2, 5), Segment(5, 9)) and layout.home.tolist() == [0, 1, 2, 3, 4, 7, 8]


def test_recurrent_layers_that_are_told_the_borders_read_documents_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernels for a GPU do: state and convolution begin anew where `cu_seq_lens_q` says."""
    import transformers.models.qwen3_next.modeling_qwen3_next as modeling

    scan, convolve = modeling.torch_chunk_gated_delta_rule, modeling.causal_conv1d_fn

    def pieces(ends: Tensor, *tensors: Tensor, dim: int) -> Any:
        lengths = ends.diff().tolist()
        return zip(*(x.split(lengths, dim) for x in tensors), strict=True)

    def scan_each(query, key, value, *, g, beta, cu_seqlens=None, seq_idx=None, **rest):
        if cu_seqlens is None:
            return scan(query, key, value, g=g, beta=beta, **rest)
        parts = pieces(cu_seqlens, query, key, value, g, beta, dim=1)
        return torch.cat([scan(q, k, v, g=decay, beta=b, **rest)[0] for q, k, v, decay, b in parts], 1), None

    def convolve_each(x, *args, seq_idx=None, **rest):
        if seq_idx is None:
            return convolve(x, *args, **rest)
        ends = torch.nn.functional.pad(seq_idx[0].bincount().cumsum(0), (1, 0))
        return torch.cat([convolve(part, *args, **rest) for (part,) in pieces(ends, x, dim=2)], 2)

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", scan_each)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", convolve_each)
    model = tiny("qwen3_next")
    lm = PackedLM(model)
    assert (lm.reading.way, lm.reading.attention) == ("joined", "documents")
    assert_alike(model, lm)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_document_beyond_the_rotary_border_changes_no_other(kind: str) -> None:
    """16 positions as the model was made: documents of 3 to 30 tokens, among them the border's own 16 and 17."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    sizes: dict[str, Any] = {"max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
        sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    family = "Phi3" if kind == "longrope" else "Llama"
    make = lambda: build(family, rope_parameters=rope, sliding_window=None, pad_token_id=0, **sizes)  # noqa: E731
    model, numbers = make(), torch.Generator().manual_seed(0)
    lm = PackedLM(model)
    assert lm.reading.way == "packed" and lm.border == lengths_border(model) == 16
    for lengths in ([3, 16, 5], [3, 30, 16, 17, 24, 2]):
        batch, sequences = batch_of([torch.randint(3, V, (n,), generator=numbers).tolist() for n in lengths], [(6, 5, 1)])
        with torch.no_grad():
            fresh = [alone(make(), batch_of([sequence], [])[0], [sequence]) for sequence in sequences[: len(lengths)]]
            got = lm(batch)[: sum(lengths) - len(lengths)]
        torch.testing.assert_close(got, torch.cat(fresh), rtol=0, atol=1e-5)


def test_a_deep_model_in_half_precision_is_compared_without_its_rounding() -> None:
    """24 layers of large random weights: its own rounding in bfloat16 is far above what the check lets pass."""
    model = build("Qwen3", num_hidden_layers=24).bfloat16()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert PackedLM(model).reading.way == "packed"
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_head_whose_format_is_asked_for_computes_in_float32_too() -> None:
    """Mamba 2 casts its last states to the format of its head before it calls it."""
    assert PackedLM(tiny("mamba2").bfloat16()).reading.way == "rows"


def test_computing_in_float32_a_layer_at_a_time_is_the_model_in_float32() -> None:
    model: Any = build("Gemma3").bfloat16()
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with in_float32(model):
            got = model(input_ids=tokens).logits
        want = model.float()(input_ids=tokens).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["mamba", "rwkv", "qwen3_next", "bloom, whose positions are a bias", "llama4, attention in chunks"]
)
def test_answers_of_models_that_read_rows_are_what_one_pass_says(name: str) -> None:
    """Prompts of two lengths; answers end at different steps. With the model's cache where that serves, else without."""
    model = tiny(name)
    lm = PackedLM(model)
    prompts, ends = [[5, 6, 7], [8, 9], [10, 11, 12], [4, 3]], list(range(12))
    found = sample(lm, prompts, 3, Sampling(9, 0.7, 1.0, 0, 6), ends)
    assert len({len(answer.tokens) for answers in found for answer in answers}) > 2
    for prompt, answers in zip(prompts, found, strict=True):
        for answer in answers:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0].float() / 0.7
            chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert answer.logps == pytest.approx(chosen.tolist(), abs=1e-4)


def test_a_mask_of_the_models_own_making_is_not_lost() -> None:
    """Doge adds a learned mask, zero at first: left out, all values would be right, and its parameters would learn nothing."""
    sizes: dict[str, Any] = {**SMALL, "intermediate_size": 64, "pad_token_id": 0, "keep_window_size": 64}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.DogeConfig(**sizes))
    lm = PackedLM(model)
    assert (lm.reading.way, lm.reading.why) == ("rows", "its attention adds a mask of its own making")
    assert_alike(model, lm)
    assert all(layer.self_attn.A.requires_grad for layer in model.model.layers)


def test_a_model_that_padding_changes_reads_one_document_at_a_time() -> None:
    model = tiny("mamba")
    forward = model.backbone.forward

    def padded_otherwise(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        output = forward(*args, attention_mask=attention_mask, **options)
        if attention_mask is not None:
            output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.backbone.forward = padded_otherwise
    lm = PackedLM(model)
    assert lm.reading.way == "alone" and "the model reads one document at a time (train.packing=auto): " in lm.reading.line
    assert_alike(model, lm)


def test_a_head_that_leaves_out_what_its_config_says_is_found_out() -> None:
    """Aya Vision's logits are not multiplied by the scale of its text model's config; Cohere's own are."""
    model: Any = build("Cohere")
    assert not PackedLM(model).plain_head
    model.logit_scale = 1.0
    assert model.config.logit_scale == 0.25
    lm = PackedLM(model)
    assert lm.plain_head and lm.head.scale == 1.0
    assert_alike(model, lm)


@pytest.mark.parametrize(
    ("said", "scale", "softcap"),
    [
        ({"logit_scale": 0.25}, 0.25, None), ({"logits_scaling": 4.0}, 0.25, None),
        ({"output_multiplier": 3.0, "final_logit_softcapping": 20.0}, 3.0, 20.0),
        ({"logits_mup_width_multiplier": 2.0}, 0.5, None), ({"output_logit_soft_cap": 30.0}, 1.0, 30.0),
    ],
)  # fmt: skip
def test_a_head_is_what_its_config_calls_it(said: dict[str, float], scale: float, softcap: float | None) -> None:
    head = head_of(torch.nn.Linear(2, 3), SimpleNamespace(**said))  # pyright: ignore[reportArgumentType]
    assert (head.scale, head.softcap) == (scale, softcap)


def test_what_stands_between_the_last_layer_and_the_head_is_gone_through() -> None:
    """ModernBERT's decoder has a dense layer and a norm there: values and gradients of a pack are those of each alone."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SMALL, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 1}
    config = transformers.ModernBertDecoderConfig(**sizes)
    model: Any = transformers.ModernBertDecoderForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    lm, (batch, sequences) = PackedLM(model), batch_of([[3, 7, 5, 9, 2], [8, 4, 6, 1, 3, 2]], [(3, 2, 4)])
    assert lm.reading.way == "packed" and {layer.kind for layer in layers_of(model).values()} == {Kind.LINEAR}
    torch.testing.assert_close(lm(batch), alone(model.eval(), batch, sequences), rtol=0, atol=1e-5)
    lm(batch).sum().backward()
    assert float(model.lm_head.dense.weight.grad.abs().max()) > 0


def test_reversible_layers_are_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "attention_head_size": 16, "num_attention_heads": 2, "feed_forward_size": 32}
    config = transformers.ReformerConfig(
        **sizes, attn_layers=["local", "local"], is_decoder=True, vocab_size=V, axial_pos_embds=False, local_attn_chunk_length=4
    )
    with pytest.raises(UserError, match=r"ReformerModelWithLMHead are 64 wide, not 32: its layers are reversible"):
        PackedLM(transformers.ReformerModelWithLMHead(config))


def test_experts_in_one_matrix_are_seen_and_left_as_they_are() -> None:
    """DBRX's: in the meta device's shapes, [4 experts x 8, 32]."""
    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=1, vocab_size=V, attn_config={"kv_n_heads": 4, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 1},
    )  # fmt: skip
    with torch.device("meta"):
        found = layers_of(transformers.DbrxForCausalLM(config))
    assert [layer.short for layer in found.values() if layer.kind is Kind.BELOW] == ["mlp.w1", "mlp.v1", "mlp.w2"]


def test_a_model_that_does_not_say_where_its_head_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = SMALL
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(UserError, match=r"model\.name: LlamaForCausalLM does not say where its head is"):
        PackedLM(model)


def test_a_model_that_keeps_its_residuals_in_float32_has_a_head_in_bfloat16() -> None:
    """As Mamba 2's own forward, which narrows them for the head; in training, in measuring and where answers are drawn."""
    model, sequence = tiny("mamba2").bfloat16(), [5, 6, 7, 8, 9, 10]
    lm = PackedLM(model)
    with torch.no_grad():
        own = model(torch.tensor([sequence[:-1]])).logits[0].float().log_softmax(-1)
    expected = own.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
    found = lm(batch_of([sequence], [])[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    found.sum().backward()
    (answers,) = sample(lm, [sequence], 1, Sampling(3, 1.0, 1.0, 1, 1), [0])
    assert len(answers[0].tokens) in (1, 2, 3)
