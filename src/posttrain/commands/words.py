"""The words of a command that takes runs and settings: `posttrain eval RUN... data.path=FILE`."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.config.schema import DataConfig
from posttrain.errors import UserError, did_you_mean
from posttrain.models.language.run_data import PREFIX


def runs_and_settings(words: Sequence[str], keys: Sequence[str] = ()) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The runs, the settings of `keys`, and those of `data`, which come in place of a run's own. Raises UserError for a key that
    does not exist."""
    known = [*keys, *(PREFIX + name for name in DataConfig.model_fields)]
    runs: list[str] = []
    settings: dict[str, str] = {}
    of_data: dict[str, str] = {}
    for word in words:
        key, separator, value = word.removeprefix("+").partition("=")
        if not separator or "/" in key:
            runs.append(word)
        elif ".".join(key.split(".")[:2]) in keys:
            settings[key] = value
        elif ".".join(key.split(".")[:2]) in known:
            of_data[key] = value
        elif key in ("model", "model.name", "init"):
            raise UserError(f"{word}: a run or a model is a word of its own here: {value}")
        else:
            told = ", ".join([*keys, f"{PREFIX}KEY as the run's own config has it"])
            raise UserError(f"unknown key '{key}'{did_you_mean(key, known)} (there are: {told})")
    return runs, settings, of_data
