"""Configs of other tools become ours: each key is taken over, or named with a reason, and the result composes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.commands.bring.bring import import_config, translate
from posttrain.config.compose import compose_run
from posttrain.errors import UserError

AXOLOTL = """
base_model: org/model
load_in_8bit: false
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules:
sequence_len: 2048
sample_packing: true
datasets:
  - path: org/set
    type: alpaca
    split: train[:10%]
val_set_size: 0.02
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: linear
learning_rate: 2e-4
warmup_steps: 10
max_steps: 200
bf16: auto
special_tokens:
  pad_token: <|end|>
wandb_project:
made_up: 7
"""
FROM_AXOLOTL = {
    "peft": "qlora", "peft.r": 32, "peft.alpha": 16, "peft.dropout": 0.05, "peft.targets": "all-linear",
    "optim": "paged_adamw_8bit", "optim.lr": 2e-4, "optim.schedule": "linear", "optim.warmup_steps": 10,
    "optim.weight_decay": 0.0, "data.path": "org/set", "data.shape": "alpaca", "data.split": "train[:10%]",
    "data.eval_share": 0.02, "optim.betas": [0.9, 0.999],
    "model.name": "org/model", "train.max_length": 2048, "train.grad_accum": 4, "train.batch_size": 2, "train.epochs": 3,
    "train.max_steps": 200, "train.precision": "auto",
}  # fmt: skip
FACTORY = """
model_name_or_path: org/model
stage: kto
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: data/pairs.jsonl
template: qwen
cutoff_len: 1024
learning_rate: 5.0e-6
pref_beta: 0.2
report_to: none
"""
FROM_FACTORY = {
    "peft": "lora", "peft.r": 8, "peft.alpha": 16, "peft.dropout": 0.0, "peft.targets": ["q_proj", "v_proj"],
    "dpo.loss": "kto", "dpo.beta": 0.2, "data.path": "data/pairs.jsonl", "model.name": "org/model", "tracker": "none",
    "train.max_length": 1024, "train.epochs": 3.0, "train.batch_size": 8, "train.grad_accum": 1,
    "optim": "adamw", "optim.lr": 5e-6, "optim.schedule": "linear", "optim.warmup_ratio": 0.0, "optim.weight_decay": 0.0,
    "optim.betas": [0.9, 0.999],
}  # fmt: skip
TRL = """
model_name_or_path: org/model
dataset_name: org/pairs
dataset_train_split: train_prefs
learning_rate: 1e-6
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
num_train_epochs: 1
lr_scheduler_type: cosine_with_min_lr
beta: 0.05
loss_type: ipo
max_prompt_length: 512
lr_scheduler_kwargs: {min_lr_rate: 0.1}
adam_beta2: 0.95
report_to: [wandb, tensorboard]
trust_remote_code: true
"""
FROM_TRL = {
    "model.name": "org/model", "data.path": "org/pairs", "data.split": "train_prefs", "dpo.beta": 0.05, "dpo.loss": "ipo",
    "optim": "adamw", "optim.lr": 1e-6, "optim.schedule": "cosine", "optim.min_lr": 1e-7, "optim.betas": [0.9, 0.95],
    "optim.warmup_ratio": 0.0, "optim.weight_decay": 0.0,
    "train.batch_size": 4, "train.grad_accum": 2, "train.epochs": 1, "train.max_length": 1024, "tracker": "wandb",
    "dpo.label_smoothing": 0.0,
}  # fmt: skip
CASES = [
    ("axolotl.yml", AXOLOTL, "sft", FROM_AXOLOTL, {"sample_packing", "special_tokens", "made_up"}),
    ("factory.yaml", FACTORY, "dpo", FROM_FACTORY, {"do_train", "template"}),
    ("trl.yaml", TRL, "dpo", FROM_TRL, {"max_prompt_length", "report_to", "trust_remote_code"}),
]


def written(folder: Path, text: str, name: str = "theirs.yml") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(("name", "text", "stage", "settings", "noted"), CASES, ids=lambda each: each if len(each) < 20 else "")
def test_a_config_is_taken_over_and_the_rest_is_named(
    tmp_path: Path, name: str, text: str, stage: str, settings: dict[str, Any], noted: set[str]
) -> None:
    to = tmp_path / "my.yaml"
    import_config(written(tmp_path, text, name), to)
    found = yaml.safe_load(to.read_text().replace("e-0", "e-"))
    assert found.pop("stage") == stage
    assert {key: float(value) if key == "optim.lr" else value for key, value in found.items()} == settings
    told = to.read_text().partition(" does otherwise where")[0]
    comments = [line for line in told.splitlines() if line.startswith("# ") and " - " in line]
    assert {line[2:].split(":")[0] for line in comments} == noted
    assert compose_run(stage, [f"--config={to}"])["train"]["max_length"] == settings["train.max_length"]


@pytest.mark.parametrize(("name", "text"), [case[:2] for case in CASES], ids=[case[0] for case in CASES])
def test_no_key_is_lost(name: str, text: str) -> None:
    tree = yaml.safe_load(text)
    found, _ = translate(dict(tree), name, None)
    said = {word for _, words in found.settings.values() for each in words for word in each.split(", ")}
    said |= {note[0] for note in found.notes} | found.read
    assert {key for key, value in tree.items() if value not in (None, "")} <= said


def test_the_rates_of_grpo_and_data_that_cannot_be_found(tmp_path: Path) -> None:
    text = "base_model: m\nrl: grpo\ntrl: {num_generations: 8, beta: 0.01, max_completion_length: 64}\nlearning_rate: 1e-6\n"
    found, _ = translate(yaml.safe_load(text), "a.yml", None)
    assert found.stage == "ppo"
    given = {
        key: found.settings[key][0] for key in ("ppo.advantage", "ppo.samples", "ppo.kl_coef", "rollout.max_new_tokens", "data")
    }
    assert list(given.values()) == ["grpo", 8, 0.01, 64, "file"]
    to = tmp_path / "my.yaml"
    import_config(written(tmp_path, text), to)
    with pytest.raises(UserError, match=r"data.path has no value; give data.path=..."):  # never the built-in rows in its place
        compose_run("ppo", [f"--config={to}", "reward.function=length"])


def test_what_the_schema_refuses_becomes_a_comment(tmp_path: Path) -> None:
    text = import_config(written(tmp_path, "model_name_or_path: m\nadam_epsilon: -1\ndataset_name: a/b\n"), None)
    assert "# adam_epsilon: -1 - optim.eps: input should be greater than 0 (got -1)" in text
    assert "\noptim.eps:" not in text


def test_a_key_with_a_line_of_its_own_stays_a_comment(tmp_path: Path) -> None:
    text = import_config(written(tmp_path, 'learning_rate: 1e-4\n"x\\nreward.function: a:b": "y\\noptim.eps: 1"\n'), None)
    assert {"reward.function", "optim.eps"}.isdisjoint(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: m\nadapter: llama-adapter\n", "adapter: llama-adapter has no like here"),
        ("base_model: m\nrl: ebft\n", "rl: ebft has no like here; say which of our stages it is with --stage"),
        ("optim.lr: 1\n", "is no config of Axolotl, LLaMA-Factory, TRL or transformers; ours is given as --config"),
        ("- a\n", "holds no settings"),
        ("a: [\n", "cannot be read"),
        ("distributed_type: FSDP\nnum_processes: 8\n", "posttrain starts its own: train.processes=8 train.fsdp=true\n"),
        ("distributed_type: MULTI_GPU\nnum_processes: 4\n", "posttrain starts its own: train.processes=4\n"),
    ],
)
def test_what_has_no_like_is_one_line_and_nothing_is_written(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    found = CliRunner().invoke(app, ["import", str(file), "--to", str(tmp_path / "my.yaml")])
    assert found.exit_code == 2 and said in found.output and not (tmp_path / "my.yaml").exists()


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        import_config(written(tmp_path, AXOLOTL), written(tmp_path, "mine", "my.yaml"))


def settings(text: str, name: str = "theirs.yml") -> dict[str, Any]:
    found, _ = translate(yaml.safe_load(text), name, None)
    return {key: value for key, (value, _) in found.settings.items()}


def test_splits_of_one_data_set_are_one_source() -> None:
    mixture = (
        "{datasets: [{id: a/b, config: x, split: one}, {id: a/b, config: x, split: two, weight: 0.5}, {id: a/b, config: x}]}"
    )
    found = settings(f"model_name_or_path: m\ndataset_mixture: {mixture}\n")
    assert (found["data.path"], found["data.subset"], found["data.split"]) == ("a/b", "x", "one+two+train")
    apart = settings("base_model: m\ndatasets: [{path: a/b, split: one}, {path: c/d, split: one}]\n")
    assert (apart["data.path"], apart["data.split"]) == (["a/b", "c/d"], "one")


def test_columns_of_pairs_have_their_names_here() -> None:
    found = settings("base_model: m\nrl: dpo\ndatasets: [{path: a/b, field_prompt: question, field_chosen: chosen}]\n")
    assert {key: value for key, value in found.items() if key.startswith("data.columns")} == {"data.columns.prompt": "question"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("finetuning_type: oft\noft_block_size: 16\noft_target: q_proj,v_proj\nquantization_bit: 4\n",
         {"peft": "oft", "quant": "nf4", "peft.block_size": 16, "peft.targets": ["q_proj", "v_proj"]}),
        ("finetuning_type: lora\nquantization_bit: 8\n", {"peft": "lora", "quant": "int8"}),
        ("finetuning_type: full\nuse_dft_loss: true\nactivation_offloading: true\n",
         {"sft.loss": "dft", "train.offload": "activations"}),
        ("finetuning_type: lora\nbfloat16: false\nfp16: true\nuse_wandb: false\n", {"model.dtype": "float16", "tracker": None}),
        ("loss_type: dft\nmodel_name_or_path: m\n", {"sft.loss": "dft", "dpo.loss": None}),
        ("finetuning_type: lora\nearly_stopping_steps: 3\neval_steps: 50\n", {"train.early_stopping.patience": 3}),
        ("base_model: m\ncosine_min_lr_ratio: 0.1\nlearning_rate: 2.0e-4\n", {"optim.min_lr": 2e-5}),
        ("base_model: m\nadapter: lora\nlora_target_linear: true\nlora_target_modules: [q_proj]\n",
         {"peft.targets": "all-linear"}),
    ],
)  # fmt: skip
def test_words_that_have_a_like_are_taken_over(text: str, expected: dict[str, Any]) -> None:
    found = settings("model_name_or_path: m\n" * text.startswith("finetuning") + text)
    assert {key: found.get(key) for key in expected} == expected


def test_a_default_that_does_not_belong_is_not_told(tmp_path: Path) -> None:
    text = import_config(written(tmp_path, "model_name_or_path: m\nfinetuning_type: full\ndataset: a/b\n"), None)
    assert "Not taken over" not in text


def test_what_the_schema_refuses_without_a_line_becomes_a_comment_too(tmp_path: Path) -> None:
    text = import_config(written(tmp_path, "base_model: m\nload_best_model_at_end: true\nevals_per_epoch: 2\n"), None)
    assert "# load_best_model_at_end: eval/loss - train.keep_best: evaluations are compared, and there is none" in text


def test_a_chat_template_in_the_config_becomes_a_file_beside_it(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = written(tmp_path, f"base_model: m\nchat_template: jinja\nchat_template_jinja: '{source}'\n")
    import_config(file, tmp_path / "my.yaml")
    beside = tmp_path / "my.jinja"
    assert beside.read_text() == source
    assert yaml.safe_load((tmp_path / "my.yaml").read_text())["model.chat_template"] == str(beside)
    assert "# chat_template: '...' - with --to my.yaml its text becomes my.jinja" in import_config(file, None)
    import_config(file, tmp_path / "other.yaml")
    (tmp_path / "third.jinja").write_text("mine")
    assert "third.jinja is there already" in import_config(file, tmp_path / "third.yaml")
    assert (tmp_path / "third.jinja").read_text() == "mine"
