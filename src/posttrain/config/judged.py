"""What runs are judged by: one of the figures that their own evaluations have, which is known before one begins."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from posttrain.config.metrics import ANSWERS, TASKS
from posttrain.config.stages import REGISTRY
from posttrain.errors import UserError, did_you_mean

_OF_ANSWERS = ("length", "ended")  # of what `eval.generate` asks for, whatever scores it


def require_measured(cfg: Any, metric: str, field: str) -> None:
    """Raises UserError, about `field`, for a metric that no evaluation of the run will have."""
    figures = REGISTRY.get(cfg.stage).figures
    if figures is None:
        return
    known = [f"eval/{name}" for name in figures] + _of_its_own(cfg)
    if any(fnmatchcase(metric, name) for name in known):
        _require_rows(cfg, metric, field)
        return
    plain = [name for name in known if "*" not in name]
    near = did_you_mean(metric, plain) or did_you_mean(f"eval/{metric.rpartition('/')[2]}", plain)
    hint = "; answers/NAME with eval.generate.metrics and prompts" if metric.startswith(f"{ANSWERS}/") else ""
    raise UserError(f"{field}: no evaluation of {cfg.stage} measures '{metric}'{near} (there are: {', '.join(known)}{hint})")


def _require_rows(cfg: Any, metric: str, field: str) -> None:
    """Raises UserError where no row will be held out to measure it on."""
    data: Any = getattr(cfg, "data", None)
    if not hasattr(data, "eval_rows") or not metric.startswith(("eval/", f"{ANSWERS}/")):
        return
    apart = data.eval_path or not data.path or data.path.startswith("builtin:")  # these hold rows out of their own
    if data.eval_rows == 0 or (data.eval_share == 0 and not apart):
        raise UserError(f"{field}: {metric} is of held-out rows, and there is none; say data.eval_rows=64, and a data.eval_share")


def _of_its_own(cfg: Any) -> list[str]:
    """Figures that the config asks for, by name; tasks of lm-eval name theirs themselves."""
    found = list[str]()
    if (asked := getattr(cfg, "eval", None)) and getattr(asked, "generate", None):
        if asked.generate.prompts:
            found += [f"eval/{name}" for name in _OF_ANSWERS]
            found += [f"{ANSWERS}/{name.rpartition(':')[2]}" for name in asked.generate.metrics]
        found += [f"{TASKS}/{name}/*" for name in asked.tasks]
    if getattr(cfg, "forgetting", None) and cfg.forgetting.budget is not None:
        found += ["general/loss", "forgetting/percent"]
    return found
