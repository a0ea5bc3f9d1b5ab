"""Reward models: the loss by hand, packed = alone, and what transformers and peft make of a saved one."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GraniteConfig

import posttrain
from posttrain.commands.evaluate import evaluate_runs
from posttrain.config.compose import compose_run
from posttrain.config.schema import DataConfig
from posttrain.data.chat.encoder import Encoder
from posttrain.data.collate import pack_pairs
from posttrain.data.prepare import prepare
from posttrain.errors import UserError
from posttrain.evaluation.calibration import correlation, expected_calibration_error, reliability, score_summary
from posttrain.losses.reward import reward_loss
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.quantization import keep_as_quantized
from posttrain.runs.cache_place import cache_root
from posttrain.stages.spec import row_uses

TINY = ("model=tiny", "train.max_steps=3", "train.batch_size=2", "optim.lr=0.01", "data.max_rows=40", "data.eval_rows=8")
TINY += ("eval.rows=4",)
METHODS = (
    "none",
    "head",
    "partial",
    "lora",
    "qlora",
    "dora",
    "vera",
    "adapter",
    "adalora",
    "pissa",
    "prefix",
    "prompt",
    "ptuning",
)


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def examples(**extra: Any) -> tuple[Any, Encoder]:
    tokenizer = AutoTokenizer.from_pretrained(builtin_directory("tiny")[0])
    encoder = Encoder(tokenizer)
    data = DataConfig.model_validate({**compose_run("rm", list(TINY))["data"], **extra})
    return prepare(data, row_uses()["rm"], encoder, 512, cache_root())[0], encoder


def test_loss_by_hand() -> None:
    scores, margin = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([0.5, 0.0])
    # -log sigma(1) = 0.313262, -log sigma(-2) = 2.126928; centering 0.01 * (2.5^2 + 0^2)
    found = reward_loss(scores, margin, torch.ones(2), centering=0.01)
    assert found.total.item() == pytest.approx(0.313262 + 2.126928 + 0.0625, abs=1e-5)
    assert float(found.metrics["accuracy"][0]) == 1.0 and float(found.metrics["margin"][0]) == pytest.approx(1.5 - 2.0)


def test_calibration_by_hand() -> None:
    sure, unsure = torch.logit(torch.tensor(0.92)), torch.logit(torch.tensor(0.57))
    margins = torch.stack([sure, sure, sure, -sure, unsure, -unsure])
    bins = reliability(margins)
    assert [(round(b.confidence, 4), b.accuracy, b.pairs) for b in bins] == [(0.57, 0.5, 2), (0.92, 0.75, 4)]
    assert expected_calibration_error(margins) == pytest.approx((2 * 0.07 + 4 * 0.17) / 6, abs=1e-6)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])) == pytest.approx(0.5)
    assert correlation(torch.ones(3), torch.arange(3.0)) == 0.0


def test_length_is_seen_in_scores() -> None:
    tokens = torch.tensor([3.0, 9.0, 5.0]), torch.tensor([1.0, 2.0, 7.0])
    rows = {"chosen": tokens[0] * 0.1, "rejected": tokens[1] * 0.1, "chosen_tokens": tokens[0], "rejected_tokens": tokens[1]}
    assert score_summary(rows)["length_correlation"] == pytest.approx(1.0)


def test_a_shared_prompt_changes_no_score_and_no_gradient() -> None:
    """One packed sequence of prompt, chosen and rejected against transformers' own classifier on each answer alone."""
    data, _ = examples()
    directory, _ = builtin_directory("tiny")
    torch.manual_seed(0)
    packed = PackedScorer(load_causal(str(directory), None, "float32", "cpu", None, None), "documents")
    torch.nn.init.normal_(packed.score.weight)  # a head of zeros gives every score and every gradient as zero
    alone: Any = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    alone.score.weight.data.copy_(packed.score.weight)
    units = [0, 1, 2]
    batch = pack_pairs(data.train, units)
    scores = packed(batch)
    singles: list[Tensor] = []
    for unit in units:
        ids, _ = data.train.sequence(unit)
        prompt, middle = (int(x) for x in data.train.splits[unit])
        for answer in (ids[prompt:middle], ids[middle:]):
            whole = torch.tensor([[*ids[:prompt], *answer]], dtype=torch.int64)
            alone.config.pad_token_id = None  # the last token is scored
            singles.append(alone(input_ids=whole).logits[0, 0])
    expected = torch.stack(singles)
    assert scores.detach().numpy() == pytest.approx(expected.detach().numpy(), abs=1e-5)
    assert expected.detach().std() > 0.1
    margin = torch.zeros(3)
    reward_loss(scores, margin, torch.ones(3), centering=0.01).total.backward()
    reward_loss(expected, margin, torch.ones(3), centering=0.01).total.backward()
    theirs: dict[str, Any] = {name: p.grad for name, p in alone.named_parameters()}
    ours: dict[str, Any] = {name: p.grad for name, p in packed.causal.named_parameters()} | {
        "score.weight": packed.score.weight.grad
    }
    assert set(theirs) <= set(ours) and len(theirs) > 15
    for name, gradient in theirs.items():
        assert gradient.any(), name
        assert (ours[name] - gradient).abs().max() < 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_an_answer_is_scored_at_its_end_of_turn_though_that_is_the_padding_token() -> None:
    data, encoder = examples()
    batch = pack_pairs(data.train, [0, 1])
    end = AutoTokenizer.from_pretrained(builtin_directory("tiny")[0]).convert_tokens_to_ids("<|im_end|>")
    assert end in encoder.end_tokens()
    assert batch.tokens[0, batch.eos_index].tolist() == [end] * 4


def test_a_margin_is_read_and_asked_for(tmp_path: Path) -> None:
    row = {"prompt": "one two:", "chosen": " three", "rejected": " four", "margin": 0.75}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "five six:", "margin": None}) + "\n")
    data, _ = examples(path=str(file), eval_share=0.0)
    assert pack_pairs(data.train, [0, 1]).extra["margin"].tolist() == [0.75, 0.0]
    file.write_text(json.dumps({**row, "margin": "wide"}) + "\n")
    with pytest.raises(UserError, match="row 1: margin is 'wide', not a finite number"):
        examples(path=str(file), eval_share=0.0)


def groups(texts: list[list[int]], method: str) -> list[list[list[int]]]:
    """Both padded to one length; but transformers looks for padding in ids alone, and soft tokens come as embeddings."""
    return [[text] for text in texts] if method in ("prompt", "ptuning") else [texts]


def scores_of(model: Any, texts: list[list[int]], pad: int) -> Tensor:
    width = max(map(len, texts))
    padded = torch.tensor([[*map(int, text), *[pad] * (width - len(text))] for text in texts])
    return model(input_ids=padded, attention_mask=(padded != pad).long()).logits[:, 0].float()


@pytest.mark.parametrize("method", METHODS)
def test_others_load_it_and_give_its_scores(tmp_path: Path, method: str) -> None:
    exact = ["quant.compute_dtype=float32"] if method == "qlora" else []  # in bfloat16 a pack's shape decides on its rounding
    posttrain.run("rm", *TINY, f"peft={method}", *exact, f"run.dir={tmp_path}/rm", "train.eval_steps=2")
    made = manifest(tmp_path / "rm")
    folder = tmp_path / "rm" / made["weights"]["path"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = getattr(torch, made["dtype"])
    if made["weights"]["kind"] == "model":
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        assert model.config.num_labels == 1
    else:
        extra: dict[str, Any] = {}
        if method == "qlora":
            from transformers import BitsAndBytesConfig

            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["score", "lm_head"],
            )  # fmt: skip
        base = AutoModelForSequenceClassification.from_pretrained(made["base"]["path"], num_labels=1, dtype=dtype, **extra)
        keep_as_quantized(base)
        model = PeftModel.from_pretrained(base, str(folder))
    if method == "prefix" and Version(version("transformers")) >= Version("5.24"):
        pytest.skip(
            f"peft {version('peft')} has no prefix tuning of a classifier with transformers 5.24, which renamed its cache"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.eval()
    data, encoder = examples()
    assert tokenizer.pad_token_id not in encoder.end_tokens()
    batch = pack_pairs(data.held_out, range(len(data.held_out)))
    rows = json.loads((tmp_path / "rm" / "held_out.json").read_text())
    for unit in range(3):
        ids, _ = data.held_out.sequence(unit)
        prompt, middle = (int(x) for x in data.held_out.splits[unit])
        texts = [[*ids[:prompt], *ids[prompt:middle]], [*ids[:prompt], *ids[middle:]]]
        with torch.no_grad():
            found = torch.cat([scores_of(model, group, tokenizer.pad_token_id) for group in groups(texts, method)])
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        assert found.tolist() == pytest.approx([rows["chosen"][unit], rows["rejected"][unit]], abs=tolerance)
    assert batch.num_answers == 2 * len(data.held_out)


def test_it_goes_on_and_is_no_language_model(tmp_path: Path) -> None:
    posttrain.run("rm", *TINY, "peft=lora", f"run.dir={tmp_path}/rm")
    posttrain.run("rm", *TINY, "peft=lora", f"init={tmp_path}/rm", f"run.dir={tmp_path}/again")
    after, before = manifest(tmp_path / "rm")["metrics"], manifest(tmp_path / "again")["metrics"]
    assert before["eval/loss_before"] == pytest.approx(after["eval/loss"], abs=1e-6)
    evaluated = evaluate_runs([str(tmp_path / "rm")])["rm"]
    assert evaluated["eval/loss"] == pytest.approx(after["eval/loss"], abs=1e-6)
    with pytest.raises(UserError, match="is a reward model, which writes nothing"):
        posttrain.run("sft", *TINY, f"init={tmp_path}/rm")
    with pytest.raises(UserError, match="is a reward model: it scores"):
        evaluate_runs([str(tmp_path / "rm"), str(tmp_path / "again")])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "lora"])
def test_a_model_without_a_classifier_goes_on_and_is_no_language_model(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Granite has none. It is said before the data is read; init, eval and init_reward find the head again."""
    tokenizer: Any = AutoTokenizer.from_pretrained(builtin_directory("tiny")[0])
    config = GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = (*TINY[1:], f"model.name={tmp_path}/base", f"peft={method}", "eval.sets=null")
    posttrain.run("rm", *base, f"run.dir={tmp_path}/rm")
    said = capsys.readouterr().out
    assert -1 < said.find("transformers has no sequence classifier for granite") < said.find("data builtin")
    assert manifest(tmp_path / "rm")["classifier"] is None
    posttrain.run("rm", *base, f"init={tmp_path}/rm", f"run.dir={tmp_path}/again")
    after, before = manifest(tmp_path / "rm")["metrics"], manifest(tmp_path / "again")["metrics"]
    assert before["eval/loss_before"] == pytest.approx(after["eval/loss"], abs=1e-6) != pytest.approx(0.693147, abs=1e-4)
    assert evaluate_runs([str(tmp_path / "rm")])["rm"]["eval/loss"] == pytest.approx(after["eval/loss"], abs=1e-6)
    with pytest.raises(UserError, match="is a reward model, which writes nothing"):
        posttrain.run("sft", *base, f"init={tmp_path}/rm")
    rollout = ("rollout.max_new_tokens=8", "train.max_steps=1", f"init_reward={tmp_path}/rm", f"run.dir={tmp_path}/ppo")
    posttrain.run("ppo", *base, *rollout)
    assert manifest(tmp_path / "ppo")["parents"][0]["role"] == "reward"


def test_margin_moves_the_loss() -> None:
    data, _ = examples()
    batch = replace(pack_pairs(data.train, [0]), extra={"margin": torch.tensor([1.0])})
    wide = reward_loss(torch.tensor([0.3, 0.3]), batch.extra["margin"], torch.ones(1), centering=0.0).total
    assert wide.item() == pytest.approx(1.313262, abs=1e-5)  # -log sigma(-1)
