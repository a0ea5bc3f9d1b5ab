"""Data sets of the hub: which commit is meant, and its rows, from a copy on this machine or as they come over the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.console import say
from posttrain.data.sources.columnar import without_nulls
from posttrain.data.sources.files import NumberedRow
from posttrain.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_COMMIT = re.compile("[0-9a-f]{40}")
_FROM_CACHE = "cache"  # the name of the builder that datasets takes where the hub cannot be asked


def hub_rows(path: str, subset: str | None, split: str, revision: str | None, few: bool) -> Iterator[NumberedRow]:
    """few: not all rows will be asked for, so they come as a stream; else the whole set is downloaded first, once, to where
    datasets keeps it. What is there already is read from there."""
    with _in_one_line(path, subset, split, revision):
        builder = _builder(path, subset, revision)
        if few and not (Path(builder.cache_dir) / "dataset_info.json").is_file():
            rows: Any = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        for number, row in enumerate(rows, 1):
            yield number, without_nulls(row)


def hub_commit(path: str, subset: str | None, split: str, revision: str | None) -> str:
    """The commit that `revision` means, asked once a run; without the hub, of the copy on this machine."""
    with _in_one_line(path, subset, split, revision):
        return str(_builder(path, subset, revision).hash)


@contextmanager
def _in_one_line(path: str, subset: str | None, split: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds, several of them private
        raise UserError(_trouble(path, subset, split, revision, error)) from error


@lru_cache(maxsize=64)
def _builder(path: str, subset: str | None, revision: str | None) -> DatasetBuilder:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(path, name=subset, revision=revision)
    if (
        revision and builder.name == _FROM_CACHE and builder.hash != revision
    ):  # datasets takes its newest copy, whatever was asked
        here = f"the hub cannot be reached, and of {path} commit {builder.hash} is on this machine"
        if _COMMIT.fullmatch(revision):
            raise UserError(f"data.revision: {here}, not {revision}")
        say(f"data.revision: {here}; whether that is {revision} cannot be told")
    return builder


def _trouble(path: str, subset: str | None, split: str, revision: str | None, error: Exception) -> str:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception) else error
    said = " ".join(str(cause).split())[:200]
    if isinstance(error, ConnectionError) or "offline" in said.lower() or "connect" in type(error).__name__.lower():
        return f"data.path: no file {path} here, and cannot reach the hub for a data set of that name; give a local file"
    if isinstance(error, DatasetNotFoundError):
        at = f" at revision {revision}" if revision else ""
        return f"data.path: the hub has no data set {path}{at}, or it is private; check the name, or give a local file"
    if "split" in said.lower():
        return f"data.split: {path} has no split '{split}' ({said})"
    if "config" in said.lower():
        return f"data.subset: {path} has no subset '{subset}' ({said})"
    return f"data.path: cannot load {path} from the hub ({type(cause).__name__}: {said}); give a local file"
