"""Where a stage begins: a bare model, or what a finished run left."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from posttrain.config.schema import LanguageStage
from posttrain.errors import UserError
from posttrain.rundir import checked_weights, parent_record, read_manifest


@dataclass(frozen=True)
class Start:
    """name: the base as people call it. source: the weights to load (a directory, hub id or built-in name). adapter: a
    finished run's adapter on them, or None.

    tokenizer: where the tokenizer comes from. identity: sha256 of what the adapter adds; the base has its own digest.
    """

    name: str
    source: str
    tokenizer: str
    adapter: Path | None = None
    base_digest: str | None = None
    identity: str = ""
    parents: list[dict[str, str]] = field(default_factory=list)


def resolve_start(cfg: LanguageStage) -> Start:
    """Raises UserError for an `init` that is no finished run, or whose files are not those its manifest names."""
    if cfg.init is None:
        return Start(cfg.model.name, cfg.model.name, cfg.model.name)
    directory = Path(cfg.init).expanduser()
    if not (directory / "manifest.json").exists():
        if directory.is_dir() and not (directory / "config.json").exists():
            unfinished = (
                " (it has checkpoints: finish it with its own command first)" if (directory / "checkpoints").is_dir() else ""
            )
            raise UserError(f"init: {directory} is no finished run{unfinished}")
        if not directory.exists() and cfg.init[0] in "./~":
            raise UserError(f"init: {directory} does not exist")
        return Start(cfg.init, cfg.init, cfg.init)
    manifest = read_manifest(directory)
    weights = checked_weights(directory, manifest, "init")
    parents = [parent_record("init", directory.resolve())]
    if manifest["weights"]["kind"] == "model":
        return Start(str(weights), str(weights), str(weights), parents=parents)
    base, added = manifest["base"], manifest["files"][f"{manifest['weights']['path']}/adapter_model.safetensors"]
    return Start(base["name"], base["path"], str(weights), weights, base["digest"], added, parents)
