"""`posttrain reproduce`: rebuild a run from what it says of itself, and see whether the result agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.commands.compare_runs import RunComparison, compare_runs
from posttrain.config.code import refuse_own_code
from posttrain.config.stored import completed
from posttrain.console import say
from posttrain.errors import RunError, UserError
from posttrain.launch.subprocess_runner import run_child
from posttrain.runs.directory import CONFIG, read_config
from posttrain.runs.identity import digest
from posttrain.runs.manifest import read_manifest


def reproduce(run: Path, out: Path | None) -> list[RunComparison]:
    """Run `run`'s config again, in `out` (default: beside it); the new run says first what differs today.

    Raises UserError for what is no finished run, RunError where the result does not agree.
    """
    manifest, config = read_manifest(run), completed(_here(read_config(run)))
    if digest(read_config(run, as_written=True)) != manifest.config_digest:
        raise UserError(
            f"{run / 'config.yaml'} is not the config that the manifest was written for; it cannot be rebuilt from it"
        )
    refuse_own_code(config, "run", "start it with its stage's own command")
    place = out or run.resolve().with_name(f"{run.resolve().name}-again")
    _refuse_another(place, run)
    if manifest.changes:
        said = "; ".join(f"{each.change} from step {each.step}" for each in manifest.changes)
        say(f"its settings changed on the way ({said}); the new run has the last ones throughout")
    config["run"] = {**config["run"], "dir": str(place), "stop_after": None, "reproduces": str(run.resolve())}
    code = run_child(config, f"the run in {place}")
    if code == UserError.exit_code:
        raise UserError("the message is above")
    if code:
        raise RunError(f"the run in {place} failed (exit {code}), its own message is above; the same command goes on")
    found = compare_runs(run, place)
    for each in found:
        say(f"{each.part:<12}{each.text}")
    if wrong := [each.part for each in found if not each.same]:
        raise RunError(f"{place} does not agree with {run}: {', '.join(wrong)}")
    say(f"{place} is {run} again, bit for bit")
    return found


def _refuse_another(place: Path, run: Path) -> None:
    """Raises UserError where a run is there that does not rebuild this one: a finished one would be compared as it is."""
    if (place / CONFIG).exists() and read_config(place)["run"].get("reproduces") != str(run.resolve()):
        what = "the run itself" if place.resolve() == run.resolve() else "another run"
        raise UserError(f"--out: {place} holds {what}; name a directory that is not there")


def _here(config: dict[str, Any]) -> dict[str, Any]:
    """Without the cluster on which it ran: that is no part of a run, and this machine is not it."""
    train = {key: value for key, value in config["train"].items() if key != "launcher"}
    return {key: value for key, value in config.items() if key != "launch"} | {"train": train}
