"""What each figure of a run is called, what it means, in which unit it is, and which way it gets better: one list for all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

ANSWERS = "answers"  # the group of what `eval.generate` scores: rewards, of which more is better
TASKS = "tasks"  # the group of what lm-eval says of its tasks
LOWER_OF_TASKS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")  # as it calls them
Form = Literal["plain", "share", "percent", "count", "small"]


@dataclass(frozen=True)
class Metric:
    """A figure, by the last part of its name.

    Args:
        better: -1 where lower is, +1 where higher is, 0 where neither can be said.
        form: how a value is written: a share of 1 as 12.3%, a percent with its sign, a count in full, a small number as 2e-4.
    """

    title: str
    meaning: str
    unit: str = ""
    better: int = 0
    form: Form = "plain"


METRICS: dict[str, Metric] = {
    "loss": Metric("Loss", "what training lowers; of text -log p of a token that counts", "nats", -1),
    "nll": Metric("Negative log-likelihood", "-log p of a token that counts, without smoothing or z-loss", "nats", -1),
    "perplexity": Metric("Perplexity", "exp(loss): between how many tokens the model hesitates", "", -1),
    "accuracy": Metric("Accuracy", "share of pairs of which the better answer is preferred", "", 1, "share"),
    "accuracy_low": Metric("Accuracy, lower end", "of its 95 % interval", "", 0, "share"),
    "accuracy_high": Metric("Accuracy, upper end", "of its 95 % interval", "", 0, "share"),
    "margin": Metric("Margin", "by how much the chosen answer's reward or score is above the rejected one's", "", 1),
    "gap": Metric("Gap of likelihoods", "log p a token of the chosen answer less that of the rejected one", "nats a token", 1),
    "logp": Metric("Log-probability", "of a whole answer", "nats", 1),
    "logp_chosen": Metric("Log-probability, chosen", "of the chosen answers; where it falls the model unlearns them", "nats"),
    "logp_rejected": Metric("Log-probability, rejected", "of the rejected answers", "nats"),
    "reward_chosen": Metric("Implicit reward, chosen", "beta times log(policy / reference) of the chosen answers"),
    "reward_rejected": Metric("Implicit reward, rejected", "beta times log(policy / reference) of the rejected answers"),
    "score_chosen": Metric("Score, chosen", "what the reward model gives the chosen answers"),
    "score_rejected": Metric("Score, rejected", "what the reward model gives the rejected answers"),
    "score_std": Metric("Spread of scores", "standard deviation over all answers"),
    "calibration_error": Metric("Calibration error", "between the confidence of the model and how often it is right"),
    "length_correlation": Metric("Correlation with length", "of score or reward and length; near 1 or -1 it counts words"),
    "reward": Metric("Reward", "of an answer, before KL and penalties", "", 1),
    "reward_std": Metric("Spread of rewards", "standard deviation over the answers of a step"),
    "reward_per_token": Metric("Reward a token", "of an answer, by its length"),
    "shaped_reward": Metric("Reward that is learnt from", "with penalties, and KL where it is in the reward"),
    "drawn_reward": Metric("Reward of all that was drawn", "before groups that teach nothing are left out"),
    "gold": Metric("Gold reward", "of the check that is not trained on; falls while reward rises: it is gamed", "", 1),
    "gold_std": Metric("Spread of gold rewards", "standard deviation over the answers of a step"),
    "kl": Metric("KL to the start", "how far the answers' probabilities have moved", "nats an answer"),
    "kl_coef": Metric("Weight of KL", "what a nat of KL costs"),
    "kl_loss": Metric("KL in the loss", "as it is added to the loss", "nats a token"),
    "update_kl": Metric("KL of the updates", "between the policy that sampled and the one of now", "nats a token"),
    "entropy": Metric("Entropy", "near 0 all answers are the same", "nats a token"),
    "length": Metric("Length of answers", "in the mean", "tokens"),
    "ended": Metric("Answers that end", "share that writes its end of turn within its tokens", "", 0, "share"),
    "clip_fraction": Metric("Clipped ratios", "share of tokens that an update does not move any further", "", 0, "share"),
    "explained_variance": Metric("Explained variance", "of returns, by the value model: 1 is all, 0 is what a constant does"),
    "value_loss": Metric("Loss of the value model", "", "", -1),
    "sampling_gap": Metric("Gap of sampling", "between log-probs when sampling and when training", "nats a token"),
    "informative": Metric("Informative groups", "share of prompts whose answers got different rewards", "", 0, "share"),
    "filled": Metric("Filled batch", "share of the step that informative prompts fill", "", 0, "share"),
    "unscored": Metric("Answers without a reward", "share that no reward applies to", "", 0, "share"),
    "prompts_drawn": Metric("Prompts drawn", "for the step", "", 0, "count"),
    "prompts_kept": Metric("Prompts kept", "whose answers got different rewards", "", 0, "count"),
    "updates": Metric("Updates", "of the optimizer in a step", "", 0, "count"),
    "percent": Metric("Rise of the loss", "since before the run; below zero it became easier", "%", -1, "percent"),
    "lr": Metric("Learning rate", "of the step", "", 0, "small"),
    "grad_norm": Metric("Gradient norm", "before it is clipped"),
    "penalty": Metric("Penalty", "what the method adds to the loss"),
    "log_z": Metric("Log of the normaliser", "what z-loss keeps near zero"),
    "router_aux": Metric("Routers' balance", "1 where experts are used alike"),
    "router_load": Metric("Load of experts", "of the busiest one, against the mean"),
    "difficulty": Metric("Difficulty", "of the rows of the step, as the curriculum has them"),
    "tokens_per_second": Metric("Speed", "of training", "tokens/s", 0, "count"),
    "images_per_second": Metric("Speed", "of training", "images/s"),
    "rollout_tokens_per_second": Metric("Speed of sampling", "", "tokens/s", 0, "count"),
    "update_tokens_per_second": Metric("Speed of updates", "", "tokens/s", 0, "count"),
    "loss_instance": Metric("Loss, the individual", "on its own pictures", "", -1),
    "loss_prior": Metric("Loss, its class", "on pictures of the class, which prior preservation holds", "", -1),
    "clip_i": Metric("CLIP, pictures", "likeness of samples to the individual", "", 1),
    "clip_t": Metric("CLIP, text", "likeness of samples to their prompts", "", 1),
    "dino": Metric("DINO", "likeness of samples to the individual", "", 1),
    "tokens": Metric("Tokens", "trained on so far", "", 0, "count"),
    "images": Metric("Images", "trained on so far", "", 0, "count"),
    "count": Metric("Number", "", "", 0, "count"),
}
_PARTS = {
    "loss": "this part of the loss, before its weight",
    "reward": "this reward alone, in the mean",
}  # loss_sft, reward_brevity
_GROUPS = {"train": "training", "eval": "held out", "general": "general text", "responses": "responses"}


def metric(name: str) -> Metric:
    """What is known of a figure, by its whole name; of one that nobody has described its own words."""
    group, _, kind = name.rpartition("/")
    if name.startswith(f"{TASKS}/"):
        return _of_task(kind)
    if kind in METRICS and group != ANSWERS:
        return METRICS[kind]
    prefix, _, part = kind.partition("_")
    if prefix in _PARTS and part:
        return replace(METRICS[prefix], title=f"{METRICS[prefix].title}, {part.replace('_', ' ')}", meaning=_PARTS[prefix])
    if group == ANSWERS:
        return Metric(kind.replace("_", " ").capitalize(), "score of answers to held-out prompts, by this name", "", 1)
    return Metric(kind.replace("_", " ").capitalize(), "")


def _of_task(kind: str) -> Metric:
    words = kind.removesuffix("_stderr").replace("_", " ").capitalize()
    if kind.endswith("_stderr"):
        return Metric(f"{words}, standard error", "over the task's questions")
    return Metric(words, "of a task of lm-eval", "", -1 if kind in LOWER_OF_TASKS else 1)


def title(name: str) -> str:
    """A figure in words: `eval/loss` is "Loss, held out", `general/loss` is "Loss, general text"."""
    group = name.rpartition("/")[0]
    if name == "forgetting/percent":
        return "Forgetting, general text"
    if group == ANSWERS:
        return f"{metric(name).title}, answers"
    where = _GROUPS.get(group, group.removeprefix("drift_").replace("_", " "))
    return f"{metric(name).title}, {where}" if where else metric(name).title


def place(name: str) -> int:
    """Where a figure stands in the list, which begins with what people look for first."""
    known = list(METRICS)
    kind = name.rpartition("/")[2]
    return known.index(kind) if kind in METRICS else len(known)


def direction(name: str) -> int:
    """-1 where lower is better, +1 where higher is, 0 where neither can be said."""
    return metric(name).better


def show(name: str, value: float | None) -> str:
    """A value as people write one of its kind; a dash for none."""
    if value is None:
        return "—"
    if not math.isfinite(value):
        return "no number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    found = metric(name)
    if found.form == "share":
        return f"{value:.1%}"
    if found.form == "percent":
        return f"{value:+.2f} %"
    if found.form == "small":
        return rounded(value)
    if found.form == "count" or abs(value) >= 1e4:
        return f"{value:,.0f}"
    digits = {"perplexity": 2, "length": 1}.get(name.rpartition("/")[2], 4)
    return f"{value:.{digits}f}"


def rounded(value: float) -> str:
    """Three digits: 0.0002 is 2e-4, 12345.6 is 12,300."""
    if value and abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"
