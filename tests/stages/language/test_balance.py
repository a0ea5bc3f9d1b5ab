"""The routers' loss: a step's loss and gradients are those of transformers, however a pack is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.language.test_packed_lm import batch_of, gradients
from tests.models.peft.moe import tiny

import posttrain
from posttrain.batch import LossOutput
from posttrain.config.schema.training import LanguageTrain
from posttrain.errors import UserError
from posttrain.models.language.objectives import TOKENS
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.routers import experts_a_token, router_coefficient
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.stages.language.balance import with_balance

DOCUMENTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [13, 14, 15, 16, 17, 18, 19, 20], [30, 31, 32]]  # two forwards, one padded
OWN = {"router_aux_loss_coef": 0.5, "output_router_logits": True}


def theirs(model: Any, documents: list[list[int]]) -> torch.Tensor:
    length = max(map(len, documents))
    real = torch.tensor([[1] * len(d) + [0] * (length - len(d)) for d in documents])
    ids = torch.tensor([d + [0] * (length - len(d)) for d in documents])
    return model(input_ids=ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100), output_router_logits=True).loss


def ours(lm: PackedLM, documents: list[list[int]]) -> LossOutput:
    batch, _ = batch_of(documents, [])
    output = with_balance(TOKENS.loss, lm, router_coefficient(lm.causal, "auto"))(lm, batch)
    assert lm.routers is None
    return LossOutput(output.total / batch.loss_denominator, output.metrics)


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoeshared"])
def test_loss_and_gradients_are_those_of_transformers(name: str, packing: bool, recomputed: int) -> None:
    model = tiny(name, **OWN)
    documents = DOCUMENTS[:1] if packing else DOCUMENTS
    loss = theirs(model, documents)
    loss.backward()
    wanted = gradients(model)
    lm = PackedLM(model, packing=packing)
    lm.recompute(recomputed)
    found = ours(lm.train(), documents)
    assert found.total.item() == pytest.approx(loss.item(), abs=1e-5)
    aux, count = found.metrics["router_aux"]
    assert float(aux / count) > 0 and float(found.metrics["loss"][0] / found.metrics["loss"][1]) < loss.item() - 0.4
    found.total.backward()
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, atol=1e-5, rtol=1e-4)


def test_a_pack_counts_its_tokens_once_in_every_way() -> None:
    """Three documents and a prompt that two answers share: 20 + 5 + 4 + 6 tokens, whether they are padded and repeated or not."""
    model = tiny("qwen3_moe", **OWN)
    batch, _ = batch_of(DOCUMENTS, [(5, 4, 6)])
    found = []
    for packing in (True, False):
        lm = PackedLM(model, packing=packing)
        with lm.routed() as packs:
            lm(batch)
        ((logits,),) = packs  # the first layer has no experts
        assert logits.shape == (35, 4)
        found.append(logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_which_models_have_the_loss() -> None:
    names = ("qwen3_moe", "mixtral", "ernie4_5_moe", "jamba", "granitemoehybrid", "deepseek_v3", "llama4_text", "hunyuan_v1_moe")
    assert [experts_a_token(tiny(name)) for name in names] == [2, 2, 2, 2, 2, 0, 0, 0]
    assert router_coefficient(tiny("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.25), "auto") == 0.25
    assert router_coefficient(tiny("qwen3_moe"), "auto") == router_coefficient(tiny("deepseek_v3"), "auto") == 0
    assert router_coefficient(tiny("qwen3_moe"), 0.125) == 0.125
    with pytest.raises(UserError, match=r"^train\.router_aux_loss: .* DeepseekV3ForCausalLM; say train\.router_aux_loss=0$"):
        router_coefficient(tiny("deepseek_v3"), 0.1)


def test_a_model_without_routers_and_ppo_are_refused_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.stages.language.prepare.read_mixture", lambda *_: pytest.fail("the data was read"))
    words = ["model=tiny", "eval.sets=null", "train.max_steps=1", "train.router_aux_loss=0.01", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"^train\.router_aux_loss: transformers has no loss for routers of"):
        posttrain.run("sft", *words)
    with pytest.raises(UserError, match=r"train\.router_aux_loss: ppo's loss has none"):
        posttrain.run("ppo", *words, "reward.function=[posttrain.rewards:length]")
    assert LanguageTrain.model_fields["router_aux_loss"].is_required()


@pytest.mark.parametrize(
    ("stage", "more"),
    [("sft", ["data.max_rows=12", "train.router_aux_loss=0.01"]), pytest.param("dpo", [], marks=pytest.mark.slow)],
)
def test_a_run_logs_the_balance(stage: str, more: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny", None, None, None)
    tiny("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    if stage == "dpo":
        rows = [{"prompt": f"{i} and", "chosen": f" {i + 1} then", "rejected": " no more of it"} for i in range(12)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        more = [f"data.path={tmp_path / 'pairs.jsonl'}", "+peft=lora"]
    common = [f"model.name={tmp_path / 'base'}", "eval.sets=null", "train.max_steps=1", "train.max_length=64"]
    posttrain.run(stage, *common, *more, f"run.dir={tmp_path / 'run'}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = next(line for line in lines if "train/loss" in line)
    assert 1 <= figures["train/router_load"] <= 2
    assert ("train/router_aux" in figures) == (stage == "sft")
