"""What a result must agree with: plain transformers and peft on the same rows. Each check says what is wrong, or ''."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open

from architectures import rows
from posttrain.models.language.reward_model import saved_head

if TYPE_CHECKING:
    from architectures.trial import Cell, Ran, Trial

TOLERANCE = 1e-4  # of a loss, in float32
MOVED = 0.02  # of a weight's change: rounding, some steps deep


def without_dropout(source: Path, target: Path) -> None:
    """The same model, whose config turns all of its dropouts off: then training itself can be compared."""
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps(_still(json.loads(file.read_text())), indent=2))


def _still(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _still(each, name) for name, each in value.items()}
    dropout = isinstance(value, float) and any(word in key for word in ("drop", "pdrop", "jitter"))
    return 0.0 if dropout else value


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward for ppo where there is no reward model."""
    return [len(response) / 10 for response in responses]


def full(trial: Trial) -> str:
    """Losses, gradients and every weight after two steps of full training are those of a plain loop over single rows."""
    found = [line for line in trial.ran["full"].metrics if "train/loss" in line]
    plain, began = (_model(trial, trial.folder / "still") for _ in range(2))
    expected = rows.plain_training(plain)
    for step, (line, (loss, norm)) in enumerate(zip(found, expected, strict=True), 1):
        if trouble := _differ(f"loss of step {step}", line["train/loss"], loss):
            return trouble
        if trouble := _differ(f"gradient of step {step}", line["train/grad_norm"], norm, 1e-3 * max(1.0, norm)):
            return trouble
    # loaded as ours are: a class may have a row of zeros at every load (Youtu, where the padding is)
    plain.save_pretrained(trial.folder / "plain")
    return _weights_differ(_model(trial, trial.ran["full"].directory / "model"), _model(trial, trial.folder / "plain"), began)


@torch.no_grad()
def _weights_differ(found: Any, expected: Any, began: Any) -> str:
    """began: before training, for how far a weight has moved at all."""
    first, theirs = dict(began.named_parameters()), dict(expected.named_parameters())
    worst, where = 0.0, ""
    for name, weight in found.named_parameters():
        moved = float((theirs[name] - first[name]).abs().max())
        off = float((weight - theirs[name]).abs().max()) / (moved + 1e-4)
        worst, where = max((worst, where), (off, name))
    return f"{where} is off by {worst:.1%} of its change" if worst > MOVED else ""


def lora(trial: Trial) -> str:
    """It starts as the base and ends as what plain peft makes of the files."""
    lines = trial.ran["lora"].metrics
    if trouble := _differ("loss before", lines[0]["eval/loss"], rows.plain_loss(_model(trial, trial.folder / "base"))):
        return trouble
    if abs(lines[-1]["eval/loss"] - lines[0]["eval/loss"]) < 10 * TOLERANCE:
        return f"nothing was learned: {lines[0]['eval/loss']:.5f} became {lines[-1]['eval/loss']:.5f}"
    return ""


def qlora(trial: Trial) -> str:
    """Near the base before; plain peft loads it; merged onto its own 4-bit base made whole, it is what the run ended with."""
    lines = trial.ran["qlora"].metrics
    base = rows.plain_loss(_model(trial, trial.folder / "base"))
    if trouble := _differ("loss before", lines[0]["eval/loss"], base, 0.2 * base):
        return trouble
    if lines[-1]["eval/loss"] >= lines[0]["eval/loss"]:
        return f"nothing was learned: {lines[0]['eval/loss']:.5f} became {lines[-1]['eval/loss']:.5f}"
    _peft(_model(trial, trial.folder / "base"), trial.ran["qlora"])
    if (merged := trial.ran["dequantized"]).code:
        return f"merged onto the weights that it was trained on: {merged.cell.said}"
    return _differ("loss merged", rows.plain_loss(_model(trial, merged.directory)), lines[-1]["eval/loss"], 1e-3)


def dpo(trial: Trial) -> str:
    """The first margin is 0, the first loss log 2, and the chosen answers as likely as plain transformers has them."""
    lines = trial.ran["dpo"].metrics
    first = next(line for line in lines if "train/loss" in line)
    if trouble := _differ("first loss", first["train/loss"], 0.69314718) or _differ("first margin", first["train/margin"], 0):
        return trouble
    start = _model(trial, trial.folder / "base")
    chosen = rows.plain_chosen(start if trial.ran["lora"].code else _peft(start, trial.ran["lora"]))
    if trouble := _differ("log p of the chosen", first["train/logp_chosen"], chosen, 1e-3):
        return trouble
    chosen = rows.plain_chosen(_peft(_model(trial, trial.folder / "base"), trial.ran["dpo"]))
    return _differ("log p of the chosen after it", lines[-1]["eval/logp_chosen"], chosen, 1e-3)


def rm(trial: Trial) -> str:
    """The first loss is log 2, and its scores those of the saved head on plain peft's hidden states."""
    ran = trial.ran["rm"]
    first = next(line for line in ran.metrics if "train/loss" in line)
    if trouble := _differ("first loss", first["train/loss"], 0.69314718):
        return trouble
    loaded = _peft(_model(trial, trial.folder / "base"), ran)
    score = rows.plain_score(loaded, saved_head(ran.directory / "adapter")[0])
    return _differ("score of the chosen", ran.metrics[-1]["eval/score_chosen"], score, 1e-5)


def ppo(trial: Trial) -> str:
    """Generation and training give a token the same log p, nothing is clipped at the start, and plain peft loads the result."""
    _peft(_model(trial, trial.folder / "base"), trial.ran["ppo"])
    first = next(line for line in trial.ran["ppo"].metrics if "train/loss" in line)
    gap = _differ("log p in generation against training", first["train/sampling_gap"], 0)
    # four updates small enough to clip nothing, but for an expert that changes
    return gap or _differ("share clipped", first["train/clip_fraction"], 0, 0.1)


def merge(trial: Trial) -> str:
    """Plain transformers on the merged files is the run's end."""
    merged = _model(trial, trial.ran["merge"].directory)
    return _differ("loss merged", rows.plain_loss(merged), trial.ran["lora"].metrics[-1]["eval/loss"])


def reload(trial: Trial) -> str:
    """Plain transformers on full training's files, and plain peft on LoRA's, are what the runs ended with."""
    model = _model(trial, trial.ran["full"].directory / "model")
    if trouble := _differ("full", rows.plain_loss(model), trial.ran["full"].metrics[-1]["eval/loss"]):
        return trouble
    loaded = _peft(_model(trial, trial.folder / "base"), trial.ran["lora"])
    return _differ("lora", rows.plain_loss(loaded), trial.ran["lora"].metrics[-1]["eval/loss"])


def experts(trial: Trial) -> Cell:
    """Has the model routed experts, and does LoRA reach them?"""
    from architectures.trial import Cell

    names = [name for name, _ in _model(trial, trial.folder / "base").named_parameters()]
    if not any(".experts." in name for name in names):
        return Cell("none")
    found = {}
    for method in ("lora", "qlora"):
        if (ran := trial.ran[method]).code:
            return ran.cell
        with safe_open(ran.directory / "adapter" / "adapter_model.safetensors", "pt") as file:
            found[method] = any(".experts." in name for name in file.keys())  # noqa: SIM118
    missed = [method for method, reached in found.items() if not reached]
    said = {line for method in missed for line in _left_out(trial.ran[method]) if "experts" in line}
    if said:
        return Cell("refused", "; ".join(sorted(said)))
    return Cell("wrong", f"the experts stay frozen under {' and '.join(missed)}") if missed else Cell("ok")


def _left_out(ran: Ran) -> list[str]:
    """What the manifest says of layers without an adapter."""
    manifest = json.loads((ran.directory / "manifest.json").read_text())
    return next((found["left_out"] for found in manifest.values() if isinstance(found, dict) and "left_out" in found), [])


def plan(trial: Trial) -> Cell:
    """`plan` ends as the run itself did: with as many trained parameters, or refused in the same words."""
    from architectures.trial import Cell

    found, run = trial.ran["plan"], trial.ran["lora"]
    if found.code == run.code and found.cell.said == run.cell.said:
        if found.code or found.result["trained_parameters"] == run.result["trainable"]["trained"]:
            return Cell("ok")
        return Cell("wrong", f"trained: {found.result['trained_parameters']:,}, run {run.result['trainable']['trained']:,}")
    said = [f"{name} ends with {ran.code}{': ' * bool(ran.code)}{ran.cell.said}" for name, ran in (("plan", found), ("run", run))]
    return Cell("failed" if found.code == 1 else "wrong", "; ".join(said))


def _model(trial: Trial, directory: Path) -> Any:
    """Plain transformers. Raises ValueError for weights that are missing or have no place."""
    made = getattr(transformers, trial.architecture.class_name)
    model, info = made.from_pretrained(directory, dtype="float32", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"{what.replace('_', ' ')} in {directory.name}: {sorted(map(str, info[what]))[:3]}")
    return model.eval()


def _peft(model: Any, ran: Ran) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, str(ran.directory / "adapter"))
    if trouble := [str(each.message) for each in said if "adapter keys" in str(each.message)]:
        raise ValueError(trouble[0].splitlines()[0][:200])
    return loaded.eval()


def _differ(what: str, found: float, expected: float, tolerance: float = TOLERANCE) -> str:
    return "" if abs(found - expected) <= tolerance else f"{what}: {found:.6f}, plain {expected:.6f}"
