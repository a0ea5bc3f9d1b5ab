"""What a run takes over from the one that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.config.stages import REGISTRY
from posttrain.errors import UserError
from posttrain.runs.artifact import open_artifact
from posttrain.runs.directory import CONFIG, read_config
from posttrain.runs.remote import here


def inherit_model(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """With `init` a finished run, the model is that run's. Raises UserError where the user names another one."""
    directory = Path(here(config["init"] or "", "init")).expanduser()
    said = any(line.lstrip("+").startswith(("model=", "model.name=")) for line in overrides)
    if not config["init"] or not (directory / CONFIG).is_file():
        if said and config["init"]:
            _require_its_base(config["init"], config["model"]["name"])
        return config
    whole = read_config(directory)
    parent = whole["model"]
    if whole["stage"] in REGISTRY.names() and REGISTRY.get(whole["stage"]).reads != REGISTRY.get(config["stage"]).reads:
        raise UserError(f"init: {config['init']} is a {whole['stage']} run, which {config['stage']} cannot start from")
    if said and config["model"]["name"] != parent["name"]:
        raise UserError(
            f"init: {config['init']} was trained from {parent['name']}, not from model {config['model']['name']}; leave model out"
        )
    kept = {line.lstrip("+").split("=")[0].removeprefix("model.") for line in overrides if line.lstrip("+").startswith("model.")}
    # a parent's tokens are in its tokenizer; trust is the user's alone to give; models of images have neither
    kept = (kept | {"add_tokens", "trust_remote_code"}) & config["model"].keys()
    return {**config, "model": {**config["model"], **parent, **{key: config["model"][key] for key in kept}}}


def _require_its_base(init: str, model: str) -> None:
    """Raises UserError where a model is named beside an adapter of others that names another one."""
    artifact = open_artifact(init, "init")
    base = artifact.base.path
    made = Path(base).name.removesuffix("-v1")  # a built-in model's name, of its directory in the cache
    if artifact.kind != "adapter" or not base or model in (base, made) or Path(base).expanduser() == Path(model).expanduser():
        return
    raise UserError(
        f"init: {init} is an adapter of {base}, not of model {model}; leave model out, or write that into its "
        "adapter_config.json, as base_model_name_or_path"
    )
