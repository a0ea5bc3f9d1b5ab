"""What a run knows of itself beside its weights: every checkpoint keeps it, and the manifest tells of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from posttrain.training.best import Best

# keys of checkpoints that version 0.1 wrote -> today's; what neither knows is the stage's own
_EARLIER = {"tokens": "seen", "images": "seen", "owed": "evaluation_owed", "within": "within_budget"}


@dataclass
class TrainState:
    """The counters and records of a run.

    identity: what makes the run itself, by the key under which `resume.allow` lets it change; order, references: the same of
    which units are drawn when, and of what training compares with. made_with: versions and device of this start. changes:
    {step, change} of what was not the same at a later start. before: what was measured before the first step; before_rows: each
    held-out row's loss then. seen: tokens (or images) that were trained on. drawn: hash of all rows drawn so far, in their
    order. halved: steps at which micro- batches were halved, for want of memory. left_out: updates that were not taken, and
    why. losses: the last ones, which a spike is judged by. loss_scale: what losses are multiplied by, None for no scaling;
    scale_held: updates since it was changed. evaluation_owed: a stop came before the evaluation of the step. within_budget:
    newest step whose weights the checkpoint gate let through. best: of the evaluations, where they are compared. ended: {step,
    back_to} where the run ended before its last step, or with earlier weights. window: sums since the last logged step, of each
    process. lines: of metrics.jsonl. stage: what a stage keeps of its own; a dataclass, or a dict as a checkpoint has it.
    """

    identity: dict[str, Any] = field(default_factory=dict[str, Any])
    order: dict[str, Any] = field(default_factory=dict[str, Any])
    references: dict[str, Any] = field(default_factory=dict[str, Any])
    made_with: dict[str, str] = field(default_factory=dict[str, str])
    changes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    before: dict[str, float] = field(default_factory=dict[str, float])
    before_rows: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    seen: int = 0
    seconds: float = 0.0
    drawn: str = ""
    halved: list[int] = field(default_factory=list[int])
    left_out: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    losses: list[float] = field(default_factory=list[float])
    loss_scale: float | None = None
    scale_held: int = 0
    evaluation_owed: bool = False
    within_budget: int | None = None
    best: Best | None = None
    ended: dict[str, int] | None = None
    window: list[dict[str, tuple[float, float]]] = field(default_factory=list[dict[str, tuple[float, float]]])
    lines: int | None = None
    stage: Any = field(default_factory=dict[str, Any])

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> TrainState:
        """As a checkpoint has it, also one of an earlier version."""
        known = {each.name for each in fields(cls)}
        found: dict[str, Any] = {"stage": {}}
        for key, value in kept.items():
            name = _EARLIER.get(key, key)
            if name in known:
                found[name] = value
            else:
                found["stage"] = {**found["stage"], key: value}
        if isinstance(window := found.get("window"), dict):  # version 0.2 kept that of the first process
            found["window"] = [window]
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**found, "stage": asdict(self.stage) if is_dataclass(self.stage) else self.stage}  # pyright: ignore[reportArgumentType]
