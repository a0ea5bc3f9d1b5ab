"""The losses of `sft` against transformers' and the paper's, and that none of them is what is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models.language.test_packed_lm import batch_of
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from posttrain.config.compose import compose, validate
from posttrain.config.schema import SftConfig
from posttrain.models.language.objectives import TOKENS
from posttrain.models.language.packed_lm import PackedLM
from posttrain.stages.sft.stage import loss_of, steps

DOCUMENTS = [[5, 6, 7, 8, 9, 10, 11], [30, 31, 32]]
PLAIN: dict[str, Any] = {"loss": "nll", "label_smoothing": 0.0, "z_loss": 0.0, "neftune_noise_alpha": None}


@pytest.fixture(scope="module")
def lm() -> PackedLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3
    )
    return PackedLM(LlamaForCausalLM(config).float())


def mean(lm: PackedLM, documents: list[list[int]] = DOCUMENTS, **settings: Any) -> torch.Tensor:
    batch, _ = batch_of(documents, [])
    return loss_of(SftConfig(**{**PLAIN, **settings}))(lm, batch).total / batch.loss_denominator


def logits_of(lm: PackedLM) -> tuple[torch.Tensor, torch.Tensor]:
    found = [lm.causal(input_ids=torch.tensor([each])).logits[0, :-1] for each in DOCUMENTS]
    return torch.cat(found), torch.tensor([word for each in DOCUMENTS for word in each[1:]])


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_smoothing_is_torchs_and_z_loss_the_square_of_log_z(lm: PackedLM, kernels: Any) -> None:
    lm.report = replace(lm.report, kernels=kernels)
    logits, words = logits_of(lm)
    wanted = cross_entropy(logits, words, label_smoothing=0.2)
    assert mean(lm, label_smoothing=0.2).item() == pytest.approx(wanted.item(), abs=1e-5)
    squares = logits.logsumexp(-1).square().mean()
    assert mean(lm, z_loss=0.01).item() == pytest.approx((cross_entropy(logits, words) + 0.01 * squares).item(), abs=1e-5)


def test_gradients_of_all_together_are_those_of_torch(lm: PackedLM) -> None:
    logits, words = logits_of(lm)
    wanted = cross_entropy(logits, words, label_smoothing=0.2) + 0.01 * logits.logsumexp(-1).square().mean()
    weight = lm.causal.get_output_embeddings().weight  # pyright: ignore
    (need,) = torch.autograd.grad(wanted, weight)
    (have,) = torch.autograd.grad(mean(lm, label_smoothing=0.2, z_loss=0.01), weight)
    torch.testing.assert_close(have, need, atol=1e-6, rtol=1e-4)


def test_dft_is_the_papers_as_trl_has_it(lm: PackedLM) -> None:
    logits, words = logits_of(lm)
    each = cross_entropy(logits, words, reduction="none")
    assert mean(lm, loss="dft").item() == pytest.approx((each * (-each).exp()).mean().item(), abs=1e-5)


def test_noise_is_transformers_own(lm: PackedLM) -> None:
    """Of one document, which transformers' hook knows the length of; two documents have noise of their own size."""
    words: Any = lm.causal.get_input_embeddings()
    words.neftune_noise_alpha = 5.0
    hook = words.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(1)
    wanted = mean(lm.train(), DOCUMENTS[:1])
    hook.remove()
    torch.manual_seed(1)
    found = mean(lm, DOCUMENTS[:1], neftune_noise_alpha=5.0)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert abs(found.item() - mean(lm, DOCUMENTS[:1]).item()) > 1e-3
    from posttrain.models.language.neftune import noisy

    batch, _ = batch_of(DOCUMENTS, [])
    noise = noisy(torch.zeros(10, 16), batch.segments, 5.0)
    assert noise[:7].abs().max() <= 5 / (7 * 16) ** 0.5 < noise[7:].abs().max() <= 5 / (3 * 16) ** 0.5


def test_what_is_measured_is_the_plain_loss() -> None:
    cfg = validate(compose("sft", ["model=tiny", "sft.loss=dft", "sft.neftune_noise_alpha=5"]))
    assert steps(cfg).objective.loss is TOKENS.loss and steps(cfg).objective.training_loss is not None
    assert steps(validate(compose("sft", ["model=tiny"]))).objective is TOKENS
