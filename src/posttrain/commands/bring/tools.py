"""Which tool a config is of, the stage that it asks for, and what the tool does where the config says nothing."""

from __future__ import annotations

from typing import Any, cast

from posttrain.errors import UserError

AXOLOTL, FACTORY, TRL = "Axolotl", "LLaMA-Factory", "TRL"
_SIGNS = {
    AXOLOTL: {"base_model", "base_model_config", "sequence_len", "adapter", "micro_batch_size"},
    FACTORY: {
        "finetuning_type",
        "cutoff_len",
        "template",
        "lora_rank",
        "dataset_dir",
        "model_class",
        "train_dataset",
        "dist_config",
    },
    TRL: {"model_name_or_path", "model_name", "dataset_name", "learning_rate", "per_device_train_batch_size", "num_train_epochs"},
}
_LOSSES = {"kto": "kto", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo", "dpo": None}
_OF_FACTORY = {"pt": "cpt", "sft": "sft", "rm": "rm", "ppo": "ppo", "dpo": "dpo", "kto": "dpo"}
_SHARED = {"gradient_accumulation_steps": 1, "weight_decay": 0.0, "warmup_ratio": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999}
_OF_TRAINER = {"num_train_epochs": 3.0, "per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "optim": "adamw_torch"}
# what decides the result, and is another default here
DEFAULTS: dict[str, dict[str, Any]] = {
    AXOLOTL: _SHARED
    | {"num_epochs": 1.0, "micro_batch_size": 1, "lr_scheduler": "cosine", "sequence_len": 512, "optimizer": "adamw_torch_fused"}
    | {"warmup_ratio": 0.03, "lora_dropout": 0.0},
    FACTORY: _SHARED
    | _OF_TRAINER
    | {"learning_rate": 5e-5, "cutoff_len": 2048, "lora_rank": 8, "lora_dropout": 0.0, "lora_target": "all"},
    TRL: _SHARED | _OF_TRAINER | {"max_length": 1024, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
}
_OF_PAIRS = {AXOLOTL: {"rl_beta": 0.1}, FACTORY: {"pref_beta": 0.1}, TRL: {"beta": 0.1, "label_smoothing": 0.0}}
# of TRL, which Axolotl uses too
_OF_GROUPS = {"num_generations": 8, "max_completion_length": 512, "beta": 0.0, "epsilon": 0.2, "loss_type": "dapo"}
_OF_GROUPS |= {"num_iterations": 1, "scale_rewards": "group"}
_OF_RLOO = _OF_GROUPS | {"num_generations": 2, "beta": 0.05, "loss_type": None, "scale_rewards": None}
_TRL_RATES = {"sft": 2e-5, "dpo": 1e-6, "rm": 1e-4, "ppo": 1e-6}
_SAME = (
    {"num_train_epochs", "num_epochs"},
    {"max_length", "max_seq_length", "max_seq_len"},
    {"per_device_train_batch_size", "micro_batch_size"},
    {"warmup_ratio", "warmup_steps"},
    {"lr_scheduler", "lr_scheduler_type"},
    {"optim", "optimizer"},
    {"lora_target", "lora_target_modules", "target_modules", "oft_target", "freeze_trainable_layers"},
    {"rl_beta", "beta", "dpo_beta", "orpo_alpha"},
    {"gradient_accumulation_steps", "batch_size"},  # Axolotl's batch_size is of a step
    {"lora_r", "r"},
)
_WITH_GROUPS = ("num_generations", "reward_funcs", "num_iterations", "steps_per_generation")
_WITH_RLOO = ("normalize_advantages", "reward_clip_range", "rloo_k")
_WITH_PPO = ("num_ppo_epochs", "cliprange", "reward_model_path")


def tool_of(tree: dict[str, Any], name: str) -> str:
    """The tool with most of its own words in the file. Raises UserError where there are none, and for accelerate's own file."""
    if "distributed_type" in tree:
        sharded = " train.fsdp=true" if tree["distributed_type"] in ("FSDP", "DEEPSPEED") else ""
        raise UserError(
            f"{name} is accelerate's, which says how processes start; posttrain starts its own: "
            f"train.processes={tree.get('num_processes') or 'N'}{sharded}"
        )
    counts = {tool: len(signs & tree.keys()) for tool, signs in _SIGNS.items()}
    own = {tool: count for tool, count in counts.items() if tool != TRL and count}  # all use words of transformers
    if not own and not counts[TRL]:
        raise UserError(f"{name} is no config of Axolotl, LLaMA-Factory, TRL or transformers; ours is given as --config {name}")
    return max(own, key=lambda tool: own[tool]) if own else TRL


def with_sections_open(tree: dict[str, Any], tool: str) -> dict[str, Any]:
    """With the keys of sections that stand for themselves at the top, by their usual names."""
    for section in ("trl", "peft_config"):
        if isinstance(inner := tree.get(section), dict):
            tree = {key: value for key, value in tree.items() if key != section} | inner
    renamed = {"model": "model_name_or_path", "name": "finetuning_type", "r": "lora_rank"} if tool == FACTORY else {}
    return {renamed.get(key, key): value for key, value in tree.items()}


def stage_of(tree: dict[str, Any], tool: str, asked: str | None) -> tuple[str, dict[str, Any], str]:
    """(stage, our settings that come with it, how it is known). Raises UserError for what we have no stage for."""
    word = str(tree.get({AXOLOTL: "rl", FACTORY: "stage"}.get(tool, "")) or "")
    if asked:
        return asked, {}, "as you say"
    if tool == FACTORY and word:
        if word not in _OF_FACTORY:
            raise UserError(f"stage: {word} has no like here; say which of ours it is with --stage")
        return _OF_FACTORY[word], {"dpo.loss": "kto"} if word == "kto" else {}, f"stage: {word}"
    if tool == AXOLOTL and word:
        if word in ("grpo", "gdpo"):
            return "ppo", {"ppo.advantage": "grpo"}, f"rl: {word}"
        if word not in _LOSSES:
            raise UserError(f"rl: {word} has no like here; say which of our stages it is with --stage")
        return "dpo", {"dpo.loss": _LOSSES[word]} if _LOSSES[word] else {}, f"rl: {word}"
    if tool == AXOLOTL:
        if tree.get("process_reward_model"):
            raise UserError("process_reward_model has no like here; say which of our stages it is with --stage")
        return _of_axolotl(tree)
    return _of_trl(tree)


def _of_trl(tree: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Its files do not say the trainer, whose own words do."""
    given = {word for word, value in tree.items() if value is not None}
    if word := next((word for word in _WITH_GROUPS if word in given), ""):
        return "ppo", {"ppo.advantage": "rloo" if given & {*_WITH_RLOO} else "grpo"}, word
    if word := next((word for word in _WITH_PPO if word in given), ""):
        return "ppo", {}, word
    if "center_rewards_coefficient" in tree:  # of args.json too, where it is null
        return "rm", {}, "center_rewards_coefficient"
    if tree.get("loss_type") in ("nll", "chunked_nll", "dft"):
        return "sft", {}, f"loss_type: {tree['loss_type']}"
    if given & {"desirable_weight", "undesirable_weight"}:
        return "dpo", {} if "loss_type" in given else {"dpo.loss": "kto"}, "desirable_weight"
    if given & {"beta", "loss_type", "max_prompt_length", "cpo_alpha", "simpo_gamma", "rpo_alpha"}:
        return "dpo", {}, "a guess, by its keys"
    return "sft", {}, "a guess, by its keys"


def _of_axolotl(tree: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
    if tree.get("reward_model"):
        return "rm", {}, "reward_model"
    given = tree.get("datasets")
    sources = cast("list[Any]", given) if isinstance(given, list) else []
    kinds = {str(cast("dict[str, Any]", each).get("type")) for each in sources if isinstance(each, dict)}
    if tree.get("pretraining_dataset") or kinds == {"completion"}:
        return "cpt", {}, "its data"
    return "sft", {}, "its data"


def with_defaults(tree: dict[str, Any], tool: str, stage: str) -> dict[str, Any]:
    """What the tool does where the file says nothing, of what is another default here."""
    usual = dict(DEFAULTS[tool]) | (_OF_PAIRS[tool] if stage == "dpo" else {})
    if stage == "ppo" and (tree.get("rl") in ("grpo", "gdpo") or set(_WITH_GROUPS) & tree.keys()):
        usual |= _OF_RLOO if set(_WITH_RLOO) & tree.keys() else _OF_GROUPS
        usual = {word: value for word, value in usual.items() if value is not None and word != "max_length"}
    if tool == TRL:
        usual["learning_rate"] = _TRL_RATES.get(stage, 5e-5)
    rank = tree.get("lora_rank") or usual.get("lora_rank")
    if tool == FACTORY and tree.get("lora_alpha") is None and isinstance(rank, int):
        usual["lora_alpha"] = 2 * rank
    given = {word for word, value in tree.items() if value is not None}
    same = {word: next((each for each in _SAME if word in each), {word}) for word in usual}
    return {word: value for word, value in usual.items() if not same[word] & given}
