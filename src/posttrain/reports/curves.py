"""Which metrics of a run are drawn together, as curves over its steps."""

from __future__ import annotations

from posttrain.config.metrics import ANSWERS, metric
from posttrain.reports.plots import Curve, Figure, line_figure
from posttrain.reports.run_records import Record

# Title, and the metrics drawn together: train/<name> as lines, eval/<name> as dots.
_TOGETHER = (
    ("Loss", ("loss",)),
    ("Loss on pictures of the individual and of the prior", ("loss_instance", "loss_prior")),
    ("Accuracy of pairs", ("accuracy",)),
    ("Reward margin", ("margin",)),
    ("Implicit rewards", ("reward_chosen", "reward_rejected")),
    ("Log-probability of answers", ("logp_chosen", "logp_rejected")),
    ("Scores", ("score_chosen", "score_rejected")),
    ("Reward", ("reward",)),
    ("KL to the start", ("kl",)),
    ("Gold reward", ("gold",)),
    ("Entropy", ("entropy",)),
    ("Length of answers", ("length",)),
    ("Answers that end", ("ended",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
)
SPEED = ("tokens_per_second", "images_per_second", "rollout_tokens_per_second", "update_tokens_per_second")


def run_curves(record: Record) -> list[Figure]:
    """Everything that a run has logged but its speed; what nobody has put together has a picture of its own."""
    known = {name for _, names in _TOGETHER for name in names} | {*SPEED}
    groups = [*_TOGETHER, *((metric(name).title, (name,)) for name in _trained(record) if name not in known)]
    figures = [curve_figure(title, names, record) for title, names in groups]
    for name in dict.fromkeys(n for line in record.history for n in line if n.startswith(f"{ANSWERS}/")):
        curve = Curve("held out", *record.series(name), color=2, style="points")
        figures.append(line_figure(f"Answers to held-out prompts: {metric(name).title}", [curve]))
    return [figure for figure in figures if figure]


def speed_curves(record: Record) -> list[Figure]:
    """How fast a run goes."""
    found = [curve_figure(f"{metric(name).title}, {metric(name).unit}", (name,), record) for name in SPEED]
    return [figure for figure in found if figure]


def loss_figure(title: str, record: Record) -> Figure | None:
    """The loss alone, under another title."""
    return curve_figure(title, ("loss",), record)


def curve_figure(title: str, names: tuple[str, ...], record: Record) -> Figure | None:
    """Metrics of one kind in one picture; None of those that were not logged."""
    curves: list[Curve] = []
    for i, name in enumerate(names, 1):
        words = name.rsplit("_", 1)[-1] if len(names) > 1 else "train"
        curves.append(Curve(words, *record.series(f"train/{name}"), color=i, smooth=name != "lr"))
        if len(names) == 1:
            curves.append(Curve("held out", *record.series(f"eval/{name}"), color=2, style="points"))
    found = metric(next(iter(names)))
    return line_figure(title, curves, note=found.unit, share=found.form == "share")


def _trained(record: Record) -> list[str]:
    return list(dict.fromkeys(n.removeprefix("train/") for line in record.history for n in line if n.startswith("train/")))
