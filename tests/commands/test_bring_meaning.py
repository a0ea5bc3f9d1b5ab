"""What an imported config does is what the other tool did with it: what it counts otherwise, and what it does unsaid."""

from contextlib import suppress
from typing import Any

import pytest
import yaml

from posttrain.commands.bring.bring import translate
from posttrain.errors import UserError

AXOLOTL, FACTORY, TRL = "base_model: m\n", "model_name_or_path: m\nfinetuning_type: lora\n", "model_name_or_path: m\n"
GRPO = "model_name_or_path: m\nnum_generations: 8\n"


def brought(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, what is said of words that are not taken over)."""
    found, _ = translate(yaml.safe_load(text), "theirs.yml", None)
    noted = dict(found.unsaid) | {word: why for word, _, why in found.notes}
    return {key: value for key, (value, _) in found.settings.items()}, noted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Axolotl's batch_size is of a whole step
        (AXOLOTL + "batch_size: 32\nmicro_batch_size: 4\n", {"train.batch_size": 4, "train.grad_accum": 8}),
        (AXOLOTL + "batch_size: 32\n", {"train.batch_size": 1, "train.grad_accum": 32}),
        (AXOLOTL + "micro_batch_size: 4\n", {"train.batch_size": 4, "train.grad_accum": 1}),
        # warm-up: 0 steps are none asked for; transformers' constant has no warm-up
        (TRL + "warmup_steps: 0\nwarmup_ratio: 0.1\n", {"optim.warmup_ratio": 0.1, "optim.warmup_steps": None}),
        (TRL + "warmup_steps: 0\n", {"optim.warmup_steps": 0}),
        (TRL + "warmup_steps: 20\nwarmup_ratio: 0.1\n", {"optim.warmup_steps": 20, "optim.warmup_ratio": None}),
        (TRL + "lr_scheduler_type: constant\nwarmup_ratio: 0.03\n", {"optim.schedule": "constant", "optim.warmup_ratio": 0.0}),
        (TRL + "lr_scheduler_type: constant\nwarmup_steps: 30\n", {"optim.warmup_ratio": 0.0, "optim.warmup_steps": None}),
        (TRL + "lr_scheduler_type: constant_with_warmup\nwarmup_ratio: 0.03\n", {"optim.warmup_ratio": 0.03}),
        (AXOLOTL + "lr_scheduler: constant\n", {"optim.warmup_ratio": 0.0}),
        # betas
        (TRL + "adam_beta1: 0.0\nadam_beta2: 0.95\n", {"optim.betas": [0.0, 0.95]}),
        (TRL + "optim: lion_32bit\n", {"optim": "lion", "optim.betas": [0.9, 0.999]}),  # Lion's own are 0.9, 0.99
        (TRL + "max_grad_norm: 0\n", {"optim.max_grad_norm": None}),
        (TRL + "max_grad_norm: 0.0\n", {"optim.max_grad_norm": None}),
        # a number of held-out rows is not also a share
        (FACTORY + "val_size: 100\n", {"data.eval_rows": 100, "data.eval_share": 0.5}),
        (FACTORY + "val_size: 0.1\n", {"data.eval_share": 0.1}),
        (FACTORY + "val_size: 0\n", {"data.eval_rows": 0}),
        (AXOLOTL + "val_set_size: 0.0\n", {"data.eval_rows": 0}),
        (AXOLOTL + "val_set_size: '0.05'\n", {"data.eval_share": 0.05}),
        # the best checkpoint is the result where that is asked for alone
        (TRL + "metric_for_best_model: eval_loss\nload_best_model_at_end: false\n", {"train.keep_best": None}),
        (TRL + "metric_for_best_model: loss\nload_best_model_at_end: true\n", {"train.keep_best": "eval/loss"}),
        (TRL + "metric_for_best_model: loss\nearly_stopping_patience: 3\n",
         {"train.keep_best": None, "train.early_stopping.metric": "eval/loss", "train.early_stopping.patience": 3}),
        # what is measured and saved when
        (TRL + "eval_strategy: steps\nlogging_steps: 7\n", {"train.eval_steps": 7}),
        (TRL + "eval_strategy: steps\neval_steps: 50\nlogging_steps: 7\n", {"train.eval_steps": 50}),
        (TRL + "eval_strategy: 'no'\neval_steps: 50\n", {"train.eval_steps": None}),
        (TRL + "save_strategy: 'no'\nsave_steps: 500\n", {"train.save_steps": None}),
        (TRL + "save_strategy: epoch\nsave_steps: 500\n", {"train.save_steps": None}),
    ],
)  # fmt: skip
def test_numbers_mean_what_they_meant(text: str, expected: dict[str, Any]) -> None:
    found, _ = brought(text)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TRL + "use_peft: true\n", {"peft": "lora", "peft.targets": ["q_proj", "v_proj"], "peft.r": 16}),
        (AXOLOTL + "adapter: lora\nlora_r: 8\n", {"peft.targets": ["q_proj", "v_proj"]}),
        (FACTORY, {"peft.targets": "all-linear"}),
        (TRL + "use_peft: true\nlora_target_modules: all-linear\n", {"peft.targets": "all-linear"}),
        # a section, and the words of get_peft_model
        (TRL + "peft_config: {r: 4, lora_alpha: 8, target_modules: [q_proj]}\n",
         {"peft": "lora", "peft.r": 4, "peft.alpha": 8, "peft.targets": ["q_proj"]}),
        ("model_name: m\nmax_seq_length: 2048\nload_in_4bit: true\nr: 32\nlora_alpha: 64\ntarget_modules: [q_proj]\n"
         "random_state: 3407\nuse_gradient_checkpointing: unsloth\n",
         {"peft": "qlora", "peft.r": 32, "peft.alpha": 64, "train.max_length": 2048, "train.gradient_checkpointing": "auto"}),
    ],
)  # fmt: skip
def test_an_adapter_has_the_layers_that_it_had(text: str, expected: dict[str, Any]) -> None:
    found, _ = brought(text)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "method", "lost"),
    [
        ("use_rslora: true\nuse_dora: true\n", "dora", "use_rslora"),
        ("pissa_init: true\nuse_rslora: true\n", "rslora", "pissa_init"),
        ("loraplus_lr_ratio: 16\nuse_rslora: true\n", "rslora", "loraplus_lr_ratio"),
    ],
)
def test_of_two_variants_of_lora_the_other_is_named(words: str, method: str, lost: str) -> None:
    found, noted = brought(FACTORY + words)
    assert found["peft"] == method and "with it" in noted[lost]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TRL + "loss_type: [sigmoid]\nbeta: 0.1\n", {"dpo.loss": "sigmoid"}),
        (TRL + "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1.0]\n",
         {"dpo.loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}),
        (TRL + "loss_type: [sigmoid, sft]\n", {"dpo.loss": {"sigmoid": 1.0, "sft": 1.0}}),
        (TRL + "loss_type: aot_pair\n", {"dpo.loss": "aot_unpaired"}),  # its name in TRL before 1.0
        (TRL + "loss_type: robust\n", {"dpo.label_smoothing": 0.0, "dpo.beta": 0.1}),  # ours would be 0.1
        (TRL + "beta: 0.1\nrpo_alpha: 1.0\n", {"dpo.loss": {"sigmoid": 1.0, "sft": 1.0}}),
        (TRL + "beta: 0.1\nrpo_alpha: 0\n", {"dpo.loss": None}),
        # CPO's trainer: without a reference, with the chosen answers' likelihood
        (TRL + "cpo_alpha: 0.5\nloss_type: sigmoid\nbeta: 0.2\n", {"dpo.loss": "cpo", "dpo.options.alpha": 0.5, "dpo.beta": 0.2}),
        (TRL + "cpo_alpha: 0.0\nloss_type: simpo\nsimpo_gamma: 0.5\nbeta: 2.0\n",
         {"dpo.loss": "simpo", "dpo.options.gamma": 0.5, "dpo.options.alpha": None, "dpo.beta": 2.0}),
        (TRL + "simpo_gamma: 0.3\nloss_type: simpo\n",
         {"dpo.loss": {"simpo": 1.0, "sft": 1.0}, "dpo.options.gamma": 0.3, "dpo.beta": 0.1}),
        (AXOLOTL + "rl: simpo\nrl_beta: 0.1\nsimpo_gamma: 0.5\n",
         {"dpo.loss": {"simpo": 1.0, "sft": 1.0}, "dpo.options.gamma": 0.5}),
        (AXOLOTL + "rl: simpo\ncpo_alpha: 0\n", {"dpo.loss": "simpo", "dpo.options.gamma": 0.5, "dpo.beta": 0.1}),
        (AXOLOTL + "rl: orpo\norpo_alpha: 0.2\n", {"dpo.loss": "orpo", "dpo.beta": 0.2}),
        (AXOLOTL + "rl: dpo\n", {"dpo.loss": None, "dpo.beta": 0.1}),
        (FACTORY + "stage: dpo\npref_loss: simpo\n", {"dpo.loss": "simpo", "dpo.beta": 0.1, "dpo.options.gamma": 0.5}),
        (FACTORY + "stage: dpo\npref_loss: orpo\npref_ftx: 0.0\n", {"dpo.loss": "orpo", "dpo.beta": 0.1}),
        (FACTORY + "stage: dpo\npref_ftx: 0.3\n", {"dpo.loss": {"sigmoid": 1.0, "sft": 0.3}}),
        (TRL + "desirable_weight: 1.0\nundesirable_weight: 1.33\nbeta: 0.1\n",
         {"dpo.loss": "kto", "dpo.options.undesirable_weight": 1.33}),
        # a reward model is not drawn towards 0 unless that is asked for
        ("learning_rate: 1e-4\ncenter_rewards_coefficient: null\n", {"rm.centering": 0.0}),
        (TRL + "center_rewards_coefficient: 0.01\n", {"rm.centering": 0.01}),
        (FACTORY + "stage: rm\n", {"rm.centering": 0.0}),
    ],
)  # fmt: skip
def test_a_loss_is_the_one_that_it_was(text: str, expected: dict[str, Any]) -> None:
    found, _ = brought(text)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # theirs are answers of a micro-batch, ours prompts
        (GRPO + "per_device_train_batch_size: 8\ngradient_accumulation_steps: 4\n",
         {"train.batch_size": 1, "train.grad_accum": 4, "ppo.samples": 8}),
        (GRPO + "per_device_train_batch_size: 16\ngradient_accumulation_steps: 2\n",
         {"train.batch_size": 2, "train.grad_accum": 2}),
        (GRPO + "per_device_train_batch_size: 1\ngradient_accumulation_steps: 16\n",
         {"train.batch_size": 1, "train.grad_accum": 2}),
        (GRPO + "per_device_train_batch_size: 2\ngradient_accumulation_steps: 1\n",  # 4 processes write a group together
         {"train.batch_size": None, "train.grad_accum": None}),
        ("base_model: m\nrl: grpo\nmicro_batch_size: 8\ngradient_accumulation_steps: 2\ntrl: {num_generations: 4, beta: 0.04}\n",
         {"train.batch_size": 2, "train.grad_accum": 2, "ppo.kl_coef": 0.04, "ppo.samples": 4}),
        # answers that are learnt from several times
        (GRPO + "gradient_accumulation_steps: 2\nsteps_per_generation: 8\nnum_iterations: 2\nmax_steps: 80\n",
         {"ppo.minibatches": 4, "ppo.epochs": 2, "train.max_steps": 10, "train.batch_size": 1, "train.grad_accum": 8}),
        # what TRL does unsaid: each answer once, as it is, in DAPO's mean, clipped alike above and below
        (GRPO, {"ppo.epochs": 1, "ppo.minibatches": 1, "ppo.stop_kl": None, "ppo.loss": "dapo", "ppo.clip": 0.2,
                "ppo.clip_high": 0.2,
                "ppo.kl_coef": 0.0, "ppo.scale": "group", "rollout.max_new_tokens": 512, "ppo.advantage": "grpo"}),
        (GRPO + "epsilon: 0.3\nepsilon_high: 0.28\nloss_type: grpo\n",
         {"ppo.clip": 0.3, "ppo.clip_high": 0.28, "ppo.loss": "grpo"}),
        (GRPO + "importance_sampling_level: sequence\n", {"ppo.loss": "gspo", "ppo.clip": 0.2, "ppo.clip_high": 0.2}),
        # room for the prompt beside the answer
        (GRPO + "max_completion_length: 2048\nmax_prompt_length: 1024\n",
         {"train.max_length": 3072, "rollout.max_new_tokens": 2048}),
        (GRPO + "max_completion_length: 2048\n", {"train.max_length": 2560}),
        (GRPO + "use_vllm: false\nvllm_importance_sampling_correction: true\n", {"rollout.correction": None}),
        (GRPO + "normalize_advantages: false\nbeta: 0.05\n", {"ppo.advantage": "rloo", "ppo.kl_coef": 0.05}),
    ],
)  # fmt: skip
def test_sampled_answers_are_counted_as_they_were(text: str, expected: dict[str, Any]) -> None:
    found, noted = brought(text)
    assert {key: found.get(key) for key in expected} == expected
    assert "max_steps" not in noted


def test_no_early_end_of_a_step_is_written_down() -> None:
    assert "ppo.stop_kl" in brought(GRPO)[0]  # null, which is not the default here


@pytest.mark.parametrize(
    ("text", "word", "said"),
    [
        (AXOLOTL + "val_set_size: 0.05\n", "val_set_size", "at most data.eval_rows of them"),
        (AXOLOTL, "val_set_size", "data.eval_rows=0"),
        (FACTORY, "val_size", "data.eval_rows=0"),
        (TRL, "eval_dataset", "data.eval_rows=0"),
        (AXOLOTL, "excess_length_strategy", "drops"),
        (TRL, "assistant_only_loss", "data.train_on=all"),
        (TRL + "assistant_only_loss: false\n", "assistant_only_loss", "prompt"),
        (TRL + "max_length: null\n", "max_length", "train.max_length"),
        (AXOLOTL + "deepspeed: zero3.json\n", "deepspeed", "train.processes"),
        (AXOLOTL + "hub_token: hf_abcdefgh\n", "hub_token", "HF_TOKEN"),
    ],
)
def test_what_the_tool_did_unsaid_is_said(text: str, word: str, said: str) -> None:
    assert said in brought(text)[1][word]


def test_no_secret_gets_into_the_file() -> None:
    for word in ("hub_token", "hf_hub_token", "wandb_api_key", "ms_hub_token"):
        found, _ = translate({"base_model": "m", word: "hf_abcdefgh"}, "a.yml", None)
        assert not [value for _, value, _ in found.notes if "abcdefgh" in str(value)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FACTORY + "dataset: data/a.json, data/b.json\n", {"data.path": ["data/a.json", "data/b.json"]}),
        (FACTORY + "dataset: data/a.json\neval_dataset: alpaca_en_demo\n", {"data.eval_path": None}),
        (FACTORY + "dataset: data/a.json\neval_dataset: data/b.json\n", {"data.eval_path": "data/b.json"}),
        (AXOLOTL + "datasets: [{path: a/b, revision: abc}]\n", {"data.revision": "abc"}),
        (AXOLOTL + "datasets: [{path: a/b, roles_to_train: [assistant], train_on_eos: turn}]\n", {"data.train_on": None}),
        (AXOLOTL + "datasets: [{path: a/b, roles_to_train: [human, gpt]}]\n", {"data.train_on": ["user", "assistant"]}),
        (AXOLOTL + "datasets: [{path: a/b, type: {field_instruction: q, field_output: a, format: '{instruction}'}}]\n",
         {"data.columns.instruction": "q", "data.columns.output": "a"}),
        (AXOLOTL + "test_datasets: [{path: a/b, split: test}]\n", {"data.eval_path": "a/b"}),
    ],
)  # fmt: skip
def test_data_is_what_it_was(text: str, expected: dict[str, Any]) -> None:
    found, _ = brought(text)
    assert {key: found.get(key) for key in expected} == expected


def test_usual_roles_need_no_word() -> None:
    _, noted = brought(AXOLOTL + "datasets: [{path: a/b, roles_to_train: [assistant], train_on_eos: turn}]\n")
    assert not [word for word in noted if word.startswith("datasets.")]


@pytest.mark.parametrize("value", ["much", [], {}, [1], {"a": 1}, True, -1, 1e400, "", "0.1"])
@pytest.mark.parametrize(
    "word",
    ["batch_size", "micro_batch_size", "warmup_steps", "adam_beta1", "val_set_size", "max_steps", "lora_r", "cosine_min_lr_ratio",
     "learning_rate", "num_generations", "gradient_accumulation_steps", "loss_type", "rl", "datasets", "max_grad_norm", "trl",
     "lr_scheduler", "report_to", "lora_target_modules", "dataset_mixture", "dataset_mixer", "adapter", "loss_weights", "type"],
)  # fmt: skip
def test_no_value_breaks_the_reader(word: str, value: Any) -> None:
    for tree in ({"base_model": "m", word: value}, {"model_name_or_path": "m", word: value}, {"template": "x", word: value}):
        for extra in ({}, {"rl": "grpo"}, {"num_generations": 8}, {"stage": "dpo"}):
            with suppress(UserError):
                translate(extra | tree, "a.yml", None)
