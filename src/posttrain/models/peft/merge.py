"""W0 + change in place of W0: a finished adapter written into its base's weights, file by file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.console import say
from posttrain.errors import RunError, UserError
from posttrain.models.checkpoints.files import Checkpoint, settle
from posttrain.models.hub import FILES, BaseInfo, resolve
from posttrain.models.language.pretrained import without_values
from posttrain.models.peft.disk import OnDisk, Plain, group_of
from posttrain.models.peft.export import CONFIG, WEIGHTS
from posttrain.models.peft.factors import Factors
from posttrain.models.peft.kinds import require_kind
from posttrain.models.peft.names import by_parameter
from posttrain.models.peft.places import PREFIX, as_read
from posttrain.models.peft.tokens import Rows, merge_rows
from posttrain.runs.cache import cached_directory
from posttrain.runs.cache_place import cache_root
from posttrain.runs.files import copy_own
from posttrain.runs.manifest import is_finished, read_manifest


class Adapter:
    """An adapter's files, read. config: its adapter_config.json. tensors: by name, without peft's prefix. modules: names, in the
    base, of the layers that it changes.

    Raises UserError, about `field`, for files that are missing, damaged, of no known kind, or all zero.
    """

    def __init__(self, directory: Path, field: str) -> None:
        try:
            self.config: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(directory / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{field}: {directory} holds no whole adapter ({error}); finish its run again") from None
        self.kind = require_kind(self.config, field)
        self.where = f"{field}: the adapter in {directory}"
        if bad := next((name for name, value in tensors.items() if not bool(value.isfinite().all())), None):
            raise UserError(f"{self.where} holds values that are not finite, in {bad.removeprefix(PREFIX)}; take one without")
        self._take({name.removeprefix(PREFIX): value for name, value in tensors.items()})
        if self.modules and self.kind.is_zero(self):
            raise UserError(f"{field}: the adapter in {directory} is all zero: its run has learned nothing")

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self._of_file = tensors
        self.tensors = by_parameter(self.config, tensors)
        self.modules = self.kind.layers(self.tensors)

    def name_by(self, model: Any) -> None:
        """Take the names of a base's layers, with or without weights, where a file has others for the sake of plain peft."""
        self._take(as_read(model, self._of_file))

    def objection(self) -> str:
        """Why it cannot be merged; '' where it can."""
        return self.kind.objection(self.config, self.tensors) or ("" if self.modules else "it changes no layer")

    def require_mergeable(self, field: str, instead: str) -> None:
        """Raises UserError, about `field`, where it cannot be merged. instead: what to do then."""
        if reason := self.objection():
            raise UserError(f"{field}: its adapter cannot be merged ({reason}); {instead}")

    def factors(self, module: str) -> Factors:
        """The change of a layer as b a, in float32, where it is a sum."""
        return self.kind.factors(self, module)

    def is_same(self, module: str, other: str) -> bool:
        """Is a layer's change another's?"""
        own, its = ({n.removeprefix(m): t for n, t in self.tensors.items() if n.startswith(f"{m}.")} for m in (module, other))
        return module == other or (own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in own))

    def applied(self, module: str, weight: Tensor, transposed: bool | None = None) -> Tensor:
        """The layer's weight with the change in it, float32 [out, in]. transposed: the base keeps it as [in, out]; None: as the
        adapter's files say it."""
        transposed = bool(self.config.get("fan_in_fan_out")) if transposed is None else transposed
        try:
            changed = self.kind.changed(self, module, (weight.mT if transposed else weight).float())
        except KeyError as error:
            raise UserError(f"{self.where} lacks {error.args[0]}; give the whole adapter") from None
        return changed.mT.contiguous() if transposed else changed


def write_merged(
    base_dir: Path, adapter: Adapter, out: Path, dequantized: Callable[[str], Tensor | None] | None = None, form: str = "plain"
) -> None:
    """A model directory: every weight file is read, changed, written and read again.

    dequantized: a parameter as a quantized base has it (None for one that is not quantized), in place of what is on disk. form:
    plain (in the base's own dtype; what its checkpoint keeps in fewer bits, dequantized), same (in the format of its checkpoint),
    or a dtype. Never more than a file's tensors, and new weights of one layer, are in memory. Raises RunError where a layer of
    the adapter is not in the files.
    """
    source = Checkpoint(base_dir)
    change = _Change(source, adapter, dequantized)
    out.mkdir(parents=True)
    for file, tensors in source.shards():
        tensors = {name: change.of(name, tensor) for name, tensor in tensors.items()}
        if form == "same":
            tensors = source.packed(tensors)
        elif form != "plain":
            tensors = {n: t.to(getattr(torch, form)) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        written = load_file(out / file.name)
        if wrong := [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)]:
            raise RunError(f"{out / file.name} does not hold what was written at {wrong[0]}; is the disk sound?")
    if change.left:
        raise RunError(f"the base's files have no weight for {sorted(change.left)[0]} (and {len(change.left) - 1} more)")
    files = {file for pattern in FILES for file in base_dir.glob(pattern)}
    _say_left(base_dir, copy_own((f for f in files if f.suffix != ".safetensors" and f.name != "source.json"), base_dir, out))
    merge_rows(out, Rows.of(adapter.config, adapter.tensors))
    settle(out, source.format is not None and form != "same", None if form in ("plain", "same") else form)


class _Change:
    """What becomes of every tensor on disk. left: parameters of the adapter that none of them was for."""

    def __init__(self, source: Checkpoint, adapter: Adapter, dequantized: Callable[[str], Tensor | None] | None) -> None:
        names = [entry.name for entry in source.entries]
        model = without_values(source.directory)
        self.disk = OnDisk(model, names) if model is not None else Plain(names)
        if model is not None:
            adapter.name_by(model)
        self.adapter, self.dequantized = adapter, dequantized or (lambda name: None)
        self.layers = self._layers()
        self.left = set(self.layers)
        self.group, self.now = "-", (dict[str, Tensor](), dict[str, Tensor]())
        wanted = self.layers if dequantized is None else (getattr(self.disk, "state", None) or self.layers)
        self.alone = {there: name for name in wanted if (there := self.disk.renamed(name))}
        self.groups: dict[str, list[str]] = {}
        for name in set(wanted) - set(self.alone.values()):
            self.groups.setdefault(group_of(name), []).append(name)

    def _layers(self) -> dict[str, str]:
        """The adapter's layers by what they change. Raises RunError for a weight that it changes in two ways."""
        found: dict[str, str] = {}
        for layer in self.adapter.modules:
            first = found.setdefault(self.disk.parameter(layer), layer)
            if not self.adapter.is_same(first, layer):
                raise RunError(f"{first} and {layer} share one weight, and the adapter changes it in each otherwise")
        return found

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor that takes the place of the one of this name."""
        if name in self.alone:
            parameter = self.alone[name]
            weight = self.dequantized(parameter)
            if weight is None and parameter not in self.layers:
                return tensor
            return self._applied(parameter, tensor if weight is None else weight).to(tensor.dtype).contiguous()
        instead, added = self._group(self.disk.group.get(name, "-"))
        if name in instead:
            return instead[name].to(tensor.dtype).contiguous()
        return (tensor.float() + added[name]).to(tensor.dtype).contiguous() if name in added else tensor

    def _applied(self, parameter: str, weight: Tensor) -> Tensor:
        if parameter not in self.layers:
            return weight
        self.left.discard(parameter)
        return self.adapter.applied(self.layers[parameter], weight, self.disk.is_transposed(parameter))

    def _group(self, group: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pieces on disk of a layer's weights that lie there otherwise than in memory: new ones, and what to add to old ones."""
        if group != self.group and group in self.groups:
            self.group, self.now = group, self._made(self.groups[group])
        return self.now if group == self.group else ({}, {})

    def _made(self, parameters: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        instead, added = {}, {}
        for name in parameters:
            weight = self.dequantized(name)
            if weight is not None:
                instead[name] = self._applied(name, weight).float()
            elif name in self.layers:
                if not self.adapter.kind.is_added:
                    raise RunError(
                        f"{name} lies in the base's files in pieces, and {self.adapter.kind.name} is not added to them"
                    )
                added[name] = self._applied(name, torch.zeros(self.disk.state[name].shape))  # pyright: ignore
        return tuple(self.disk.pieces(found) if found else {} for found in (instead, added))  # pyright: ignore


def merged_directory(base: BaseInfo, adapter_dir: Path, identity: str) -> Path:
    """A base with an adapter merged into it, kept in the cache: what a chained stage's new adapter belongs to.

    identity: names the adapter's content, as `base.digest` names the base's.
    """
    name = hashlib.sha256(f"{base.digest} {identity}".encode()).hexdigest()[:32]

    def make(out: Path) -> str:
        adapter = Adapter(adapter_dir, "init")
        adapter.require_mergeable("init", "give a run whose adapter can be")
        write_merged(resolve(base.path, base.revision).directory, adapter, out)
        copy_tokenizer(adapter_dir, out)
        return f"{base.name} with {adapter_dir}"

    return cached_directory(cache_root() / "models" / f"merged-{name}", make)[0]


def copy_tokenizer(adapter_dir: Path, out: Path) -> None:
    """The run's tokenizer, with its chat template, in place of the base's: of a run, the files that its manifest lists."""
    of_run = is_finished(adapter_dir.parent)
    listed = {Path(name).name for name in read_manifest(adapter_dir.parent).files} if of_run else None
    kinds = (".json", ".jinja", ".model", ".txt")
    files = (file for file in adapter_dir.iterdir() if not file.name.startswith("adapter_") and file.suffix in kinds)
    _say_left(adapter_dir, copy_own(files, adapter_dir, out, listed))


def _say_left(directory: Path, names: list[str]) -> None:
    if names:
        say(f"{directory}: {', '.join(names)} left out: links to elsewhere, or files that its manifest does not list")
