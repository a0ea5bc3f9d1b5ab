"""Ten steps beside TRL's trainers, in float32, on the same rows in the same order: the same losses to 1e-4."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is the reference here: pip install posttrain[test]")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain
from posttrain.data.collate import BatchSampler
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import Lora
from posttrain.training.seeding import seed_step

STEPS, BATCH, ACCUMULATION, SEED, LR = 10, 2, 2, 7, 3e-3
# No white space after a turn, which TRL would count as a part of the answer.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "the value of a list is read from left to right and an error is raised when no item was found in it".split()
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION, "max_steps": STEPS, "logging_steps": 1,
    "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "use_cpu": True,
    "bf16": False,
    "save_strategy": "no", "report_to": [], "max_length": 256, "train_sampling_strategy": "sequential", "disable_tqdm": True,
    "gradient_checkpointing": False,
}  # fmt: skip


def sentence(generator: torch.Generator, low: int, high: int) -> str:
    length = int(torch.randint(low, high, (1,), generator=generator))
    return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))


def rows(kind: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS * BATCH * ACCUMULATION):
        user = {"role": "user", "content": sentence(generator, 3, 12)}
        answers = [{"role": "assistant", "content": sentence(generator, 2, 30)} for _ in range(2)]
        pair = {"prompt": [user], "chosen": [answers[0]], "rejected": [answers[1]]}
        found.append(pair if kind == "dpo" else {"messages": [user, answers[0]]})
    return found


def ours(stage: str, data: list[dict[str, Any]], folder: Path, *extra: str, model: str = "model=tiny") -> list[float]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (folder / "template.jinja").write_text(TEMPLATE)
    posttrain.run(
        stage, model, *([] if "peft=none" in extra else ["+peft=lora", "peft.r=4", "peft.alpha=8"]),
        f"data.path={folder}/rows.jsonl", "data.eval_share=0",
        f"model.chat_template={folder}/template.jinja", "eval.sets=null", f"train.max_steps={STEPS}", f"train.batch_size={BATCH}",
        f"train.grad_accum={ACCUMULATION}", f"train.seed={SEED}", "train.max_length=256", f"optim.lr={LR}",
        "optim.schedule=constant", "optim.warmup_ratio=0", f"run.dir={folder}/run", *extra,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def with_lora(model: Any) -> Any:
    """As a run of ours makes it."""
    seed_step(SEED, 0, 0)
    return add_method(
        model, Lora(method="lora",
        init="default", init_rows=64, rank_pattern=None, alpha_pattern=None, r=4, alpha=8, dropout=0.0, targets="all-linear",
        dtype="float32", lr_factor=1, experts=True, router=False)
    )  # fmt: skip


def theirs(
    stage: str, data: list[dict[str, Any]], folder: Path, model: Any = None, tokenizer: Any = None, **extra: Any
) -> list[float]:
    """model: as it is to be trained; None: the built-in one with LoRA."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config, trainer = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}.get(stage) or _experimental(stage)
    if model is None:
        directory, _ = builtin_directory("tiny")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = with_lora(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    tokenizer.chat_template = TEMPLATE
    order = BatchSampler.shuffled(len(data), BATCH, ACCUMULATION, 1, SEED, len(data))
    in_order = [data[unit] for step in range(STEPS) for unit in order.step(step)]
    job = trainer(
        model=model,
        args=config(output_dir=str(folder / "trl"), **(COMMON | extra)),
        train_dataset=Dataset.from_list(in_order),
        processing_class=tokenizer,
    )
    job.train()
    return [entry["loss"] for entry in job.state.log_history if "loss" in entry]


def _experimental(stage: str) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return {"cpo": (CPOConfig, CPOTrainer)}[stage]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_labelled_answers(tmp_path: Path, loss: str) -> None:
    """Two rows, each step both of them: TRL's KL is that of a micro-batch, each prompt with the answer to the other one. Of KTO
    both are good, so that there is a drift."""
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    data = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": loss == "kto" or k == 0}
        for k, row in enumerate(rows("dpo")[:2])
    ]
    directory, _ = builtin_directory("tiny")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    order = BatchSampler.shuffled(2, BATCH, 1, 1, SEED, 2 * STEPS)
    settings: dict[str, Any] = COMMON | {"gradient_accumulation_steps": 1}
    job = KTOTrainer(
        model=with_lora(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)),
        args=KTOConfig(output_dir=str(tmp_path / "trl"), loss_type=loss, beta=0.1, **settings),
        train_dataset=Dataset.from_list([data[unit] for step in range(STEPS) for unit in order.step(step)]),
        processing_class=tokenizer,
    )
    job.train()
    expected = [entry for entry in job.state.log_history if "loss" in entry]
    found = ours("dpo", data, tmp_path, f"dpo.loss={loss}", "train.grad_accum=1", "data.max_untrained_share=1")
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 0.01, "nothing moved, so nothing was compared"
    assert loss != "kto" or any(entry["kl"] > 0.01 for entry in expected), "there was no drift, so none was compared"
    assert found == pytest.approx([entry["loss"] for entry in expected], abs=1e-4)


def test_rm(tmp_path: Path) -> None:
    """In full, on the same head; TRL scores the last token that is not padding, ours the end of turn."""
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    data = rows("dpo")
    directory, _ = builtin_directory("tiny")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = "<|endoftext|>"
    seed_step(SEED, 0, 0)
    scorer = PackedScorer(load_causal(str(directory), None, "float32", "cpu", None, None), "documents")
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    model.score.weight.data.copy_(scorer.score.weight)
    order = BatchSampler.shuffled(len(data), BATCH, ACCUMULATION, 1, SEED, len(data))
    in_order = Dataset.from_list([data[unit] for step in range(STEPS) for unit in order.step(step)])
    rate = 3 * LR  # from a head of zeros: enough to move
    settings: dict[str, Any] = COMMON | {"learning_rate": rate}
    config = RewardConfig(output_dir=str(tmp_path / "trl"), center_rewards_coefficient=0.01, **settings)
    job = RewardTrainer(model=model, args=config, train_dataset=in_order, processing_class=tokenizer)
    job.train()
    expected = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    found = ours("rm", data, tmp_path, "peft=none", f"optim.lr={rate}")
    assert abs(expected[-1] - expected[0]) > 0.01, "nothing moved, so nothing was compared"
    assert found == pytest.approx(expected, abs=1e-4)


def test_sft(tmp_path: Path) -> None:
    data = rows("sft")
    expected = theirs("sft", data, tmp_path, assistant_only_loss=True)
    found = ours("sft", data, tmp_path)
    assert expected[-1] < expected[0] - 0.02, "nothing was learned, so nothing was compared"
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("loss", "trl_loss"), [("sigmoid", "sigmoid"), ("ipo", "ipo")])
def test_dpo(tmp_path: Path, loss: str, trl_loss: str) -> None:
    data = rows("dpo")
    expected = theirs("dpo", data, tmp_path, loss_type=trl_loss, beta=0.1)
    found = ours("dpo", data, tmp_path, f"dpo.loss={loss}")
    assert abs(expected[-1] - expected[0]) > 0.01, "nothing moved, so nothing was compared"
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "trl_loss", "more"),
    [
        ("sigmoid_norm", "sigmoid_norm", {"beta": 5.0}),
        ("apo_zero", "apo_zero", {}),
        ("exo_pair", "exo_pair", {"label_smoothing": 1e-3}),
        ("{sigmoid: 0.8, hinge: 0.2}", ["sigmoid", "hinge"], {"loss_weights": [0.8, 0.2]}),
    ],
)
def test_dpo_with_other_losses(tmp_path: Path, loss: str, trl_loss: Any, more: dict[str, Any]) -> None:
    """Each with its usual settings, which no word of ours says."""
    data = rows("dpo")
    expected = theirs("dpo", data, tmp_path, **({"loss_type": trl_loss, "beta": 0.1} | more))
    found = ours("dpo", data, tmp_path, f"dpo.loss={loss}")
    assert abs(expected[-1] - expected[0]) > 0.01, "nothing moved, so nothing was compared"
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_dpo_without_a_reference(tmp_path: Path) -> None:
    """SimPO beside TRL's CPOTrainer."""
    data = rows("dpo")
    expected = theirs(
        "cpo", data, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0, max_completion_length=256
    )
    found = ours("dpo", data, tmp_path, "dpo.loss=simpo")
    assert abs(expected[-1] - expected[0]) > 0.01, "nothing moved, so nothing was compared"
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "qwen2_5_vl"])
def test_sft_of_other_architectures(tmp_path: Path, name: str, method: str) -> None:
    """A mixture of experts, recurrent layers beside attention, and the text of a vision-language model."""
    from architectures.tiny import architectures
    from architectures.tokens import make_tokenizer

    base = tmp_path / "base"
    model = next(each for each in architectures() if each.name == name).make(base)
    data = rows("sft")
    whole = model if method == "full" else with_lora(model)
    settings = {"assistant_only_loss": True, "router_aux_loss_coef": 0.0, "learning_rate": 1e-3}
    # one micro-batch: over several, TRL averages a vision-language model's means, and ours its tokens
    settings |= {"per_device_train_batch_size": BATCH * ACCUMULATION, "gradient_accumulation_steps": 1}
    expected = theirs("sft", data, tmp_path, whole, make_tokenizer(), **settings)
    words = ["model.dtype=float32", "optim.lr=1e-3", *(["peft=none"] if method == "full" else [])]
    found = ours("sft", data, tmp_path, *words, model=f"model.name={base}")
    assert expected[-1] < expected[0] - 0.02, "nothing was learned, so nothing was compared"
    assert found == pytest.approx(expected, abs=1e-4)
