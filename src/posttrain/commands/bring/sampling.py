"""GRPO and RLOO: answers are counted there, prompts here, and what an answer is learnt from is said in other words."""

from __future__ import annotations

from posttrain.commands.bring.numbers import MICRO
from posttrain.commands.bring.translation import Translation, whole

ROOM = 512  # tokens for a prompt, where nothing is said
_ROLLOUT = ("steps_per_generation", "generation_batch_size", "gradient_accumulation_steps", "num_iterations", *MICRO)


def read_sampling(found: Translation) -> None:
    """Batches, updates, clipping and lengths of a stage that compares answers to one prompt."""
    if found.stage != "ppo" or not (answers := found.number("num_generations")):
        return
    found.put("ppo.samples", whole(answers), "num_generations")
    _read_steps(found, answers)
    _read_clip(found)
    _read_room(found)
    if "ppo.advantage" in found.settings and found.settings["ppo.advantage"][0] == "rloo":
        found.take("normalize_advantages")
        found.put("reward.missing_eos_penalty", 0.0, "none there")
    found.put("ppo.stop_kl", None, "updates are never skipped there")
    if found.tree.get("use_vllm") is not True:
        found.read |= {word for word in found.tree if word.startswith("vllm_")}  # what is not used asks for nothing


def _read_steps(found: Translation, answers: float) -> None:
    """A step here draws all answers that are drawn together there, and has all the updates on them."""
    micro = next((number for word in MICRO if (number := found.number(word))), 1.0)
    accum, often = found.number("gradient_accumulation_steps") or 1.0, found.number("num_iterations") or 1.0
    together = found.number("steps_per_generation") or (found.number("generation_batch_size") or 0) / micro or accum
    found.read |= {"generation_batch_size"}
    said = ", ".join(word for word in _ROLLOUT if found.has(word))
    prompts, updates = micro * together / answers, together / accum
    found.put("ppo.epochs", whole(often), "num_iterations")
    if updates == int(updates):
        found.put("ppo.minibatches", int(updates), "steps_per_generation / gradient_accumulation_steps")
    else:
        found.note("steps_per_generation", together, "is no multiple of gradient_accumulation_steps; say ppo.minibatches")
    if (steps := found.number("max_steps") or 0) > 0:
        found.put("train.max_steps", max(1, round(steps / (often * updates))), "max_steps, of updates there")
    if prompts < 1 or prompts != int(prompts):
        why = f"count answers there, {answers:g} to one prompt; say train.batch_size and train.grad_accum, of prompts"
        found.note(said, [micro, together], why)
        return
    at_once = int(micro / answers) if micro % answers == 0 else 1
    found.put("train.batch_size", at_once, f"prompts: {micro:g} answers at once, {answers:g} to each")
    found.put("train.grad_accum", int(prompts) // at_once, f"{prompts:g} prompts a step of one process")


def _read_clip(found: Translation) -> None:
    """The ratio is clipped alike to both sides, unless two numbers are given."""
    low, high = found.number("epsilon"), found.number("epsilon_high")
    if low is not None:
        found.put("ppo.clip", low, "epsilon")
    if (upper := low if high is None else high) is not None:
        found.put("ppo.clip_high", upper, "epsilon" if high is None else "epsilon_high")
    if found.take("importance_sampling_level") == "sequence":
        found.put("ppo.loss", "gspo", "importance_sampling_level")
        found.take("loss_type")


def _read_room(found: Translation) -> None:
    """train.max_length is of prompt and answer together."""
    answer, prompt = found.number("max_completion_length"), found.number("max_prompt_length")
    if answer is None:
        return
    found.put("rollout.max_new_tokens", whole(answer), "max_completion_length")
    if (whole_length := found.number("sequence_len")) and whole_length > answer:
        found.put("train.max_length", whole(whole_length), "sequence_len")
        return
    words = "max_prompt_length + max_completion_length" if prompt else f"max_completion_length, and {ROOM} for a prompt"
    found.put("train.max_length", whole(answer + (prompt or ROOM)), words)
