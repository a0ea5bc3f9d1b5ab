"""A checkpoint's files, read as the plain weights of its model, whatever format they are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from posttrain.errors import UserError, reading
from posttrain.models.checkpoints.formats import Format, format_of
from posttrain.models.checkpoints.held import carrier
from posttrain.runs.artifact import HEAD_FILE

MOST = 250_000  # tensors of a model; each takes a part of a millisecond to look at
INDEX = "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # of safetensors' formats; of others 1


class Checkpoint:
    """The model in `directory`. format: None where its weights lie there as they are.

    Raises UserError for a format that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.format: Format | None = format_of(self.config)

    @cached_property
    def files(self) -> list[Path]:
        """Those with weights."""
        index = self.directory / INDEX
        if index.is_file():
            with reading(f"model.name: {index} cannot be read", "give the whole checkpoint"):
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [self.directory / name for name in sorted(names)]
        return sorted(file for file in self.directory.glob("*.safetensors") if file.name != HEAD_FILE)

    @cached_property
    def entries(self) -> list[Entry]:
        """The weights of the model, in the order of the files."""
        places = {name: file for file in self.files for name in self._open(file).keys()}  # noqa: SIM118 (no dict)
        if len(places) > MOST:
            raise UserError(f"model.name: {self.directory} lists {len(places):,} tensors, more than any model has; give another")
        rest, found = dict.fromkeys(places), dict[str, Entry]()
        for layout in self.format.layouts if self.format else ():
            for name in [name for name in rest if name.endswith(layout.main)]:
                stem = name[: len(name) - len(layout.main)]
                parts = {"main": name} | {part: stem + ending for part, ending in layout.parts.items()}
                if all(part in rest for part in parts.values()):
                    parts |= {part: stem + ending for part, ending in layout.optional.items() if stem + ending in rest}
                    found[name] = Entry(self, stem + layout.plain, parts, places[name])
                    for part in parts.values():
                        del rest[part]
        dropped = self.format.dropped if self.format else ()
        found |= {name: Entry(self, name, {"main": name}, places[name]) for name in rest if not name.endswith(dropped)}
        return [found[name] for name in places if name in found]

    @cached_property
    def numbers(self) -> int:
        """How many there are in all weights."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries)

    def state(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """By name, what transformers takes for a tensor and reads when it comes to it.

        dtype: of weights that are dequantized; None: they come as carriers (held.py).
        """
        return {entry.name: entry.lazy(dtype) for entry in self.entries}

    def shapes(self) -> dict[str, Tensor]:
        """By name, a tensor without numbers."""
        return {entry.name: torch.empty(entry.shape, dtype=torch.float32, device="meta") for entry in self.entries}

    def shards(self) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """File by file, what lies in it, by plain names; what is dequantized in the dtype that config.json names."""
        dtype = getattr(torch, str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"))
        for file in self.files:
            yield file, {entry.name: entry.tensor(dtype) for entry in self.entries if entry.file == file}

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by plain names as the checkpoint keeps them: what is quantized in it, in its format. Raises UserError where
        that cannot be written."""
        found: dict[str, Tensor] = {}
        quantized = {entry.name for entry in self.entries if entry.is_quantized}
        for name, value in tensors.items():
            found |= self.format.pack(name, value) if self.format and name in quantized else {name: value}
        return found

    def read(self, name: str) -> Any:
        """A tensor of the files, as safetensors has it before its numbers are read."""
        return self._slices[name]

    @cached_property
    def _slices(self) -> dict[str, Any]:
        return {name: self._open(file).get_slice(name) for file in self.files for name in self._open(file).keys()}  # noqa: SIM118

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            with reading(f"model.name: {file} cannot be read", "give the whole file"):
                self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file]

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        return {}


def settle(directory: Path, dequantized: bool, dtype: str | None) -> None:
    """Make config.json and the index of a written model say what its files hold: no format any more, another dtype."""
    file, index = directory / "config.json", directory / INDEX
    if dequantized or dtype:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for part in (config, config.get("text_config") or {}):
            if dequantized:
                part.pop("quantization_config", None)
            part |= {key: dtype for key in ("dtype", "torch_dtype") if dtype and key in part}
        if dtype:
            config.setdefault("dtype", dtype)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if index.is_file():
        names: dict[str, str] = {}
        for shard in sorted(directory.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as tensors:
                names |= dict.fromkeys(tensors.keys(), shard.name)
        size = sum(shard.stat().st_size for shard in directory.glob("*.safetensors"))
        index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Entry:
    """A weight. name: as in a plain checkpoint. parts: the tensors that it is kept in, by their names in the files. file: of the
    first of them."""

    source: Checkpoint
    name: str
    parts: dict[str, str]
    file: Path

    @property
    def is_quantized(self) -> bool:
        """Is it kept in more tensors than one?"""
        return len(self.parts) > 1

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that is meant."""
        found = _Parts(self)
        assert self.source.format or not self.is_quantized
        return self.source.format.shape(found) if self.source.format and self.is_quantized else found.shape("main")

    def sizes(self) -> dict[str, int]:
        """Bytes of each of its tensors, by the header."""
        found = {part: self.source.read(name) for part, name in self.parts.items()}
        return {part: torch.Size(each.get_shape()).numel() * BYTES.get(each.get_dtype(), 1) for part, each in found.items()}

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Its numbers: as they lie there, or dequantized, in `dtype`."""
        return self.lazy(dtype)[...]

    def lazy(self, dtype: torch.dtype | None) -> Any:
        """What `tensor` gives, once it is asked for; without a dtype, a carrier (held.py)."""
        return _Quantized(self, dtype) if self.is_quantized else self.source.read(self.name)


@dataclass(frozen=True)
class _Parts:
    entry: Entry

    def __contains__(self, part: object) -> bool:
        return part in self.entry.parts

    def shape(self, part: str) -> tuple[int, ...]:
        return tuple(self.entry.source.read(self.entry.parts[part]).get_shape())

    def dtype(self, part: str) -> str:
        return str(self.entry.source.read(self.entry.parts[part]).get_dtype())

    def tensor(self, part: str) -> Tensor:
        return self.entry.source.read(self.entry.parts[part])[...]


@dataclass(frozen=True)
class _Quantized:
    """In the place of a slice of safetensors."""

    entry: Entry
    dtype: torch.dtype | None

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, _: Any) -> Tensor:
        checkpoint_format = self.entry.source.format
        assert checkpoint_format
        if self.dtype is None:
            return carrier(checkpoint_format.elements(_Parts(self.entry)))
        return checkpoint_format.weight(_Parts(self.entry), self.dtype).contiguous()
