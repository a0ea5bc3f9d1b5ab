"""First values of an adapter that are worked out on the run's own rows, or from what quantizing has lost (`peft.init`), before
the adapter is on the base; every process, and every start of the run, has the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.batch import PackedBatch
from posttrain.config.schema import LanguageStage
from posttrain.console import say
from posttrain.data.collate import BatchSampler
from posttrain.errors import UserError, of_all
from posttrain.models.checkpoints.files import Checkpoint
from posttrain.models.hub import resolve
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import without_values
from posttrain.models.peft.disk import OnDisk
from posttrain.models.peft.first_values import Given
from posttrain.runs.cache import cached_tensors
from posttrain.runs.cache_place import cache_root
from posttrain.runs.identity import content_hash, library_versions
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.language.shapes import check_packs
from posttrain.stages.steps import Context
from posttrain.training.objective import Objective
from posttrain.training.processes import Processes
from posttrain.training.seeding import seed_step


def first_values(
    context: Context, data: PreparedData, objective: Objective[PackedBatch], processes: Processes, writes: bool, model: Any
) -> dict[str, Tensor]:
    """Of the method of the config on `model`, the bare base. writes: whether this process writes the cache. Every process must
    call it. Raises UserError where there is too little to read."""
    cfg: LanguageStage = context.cfg
    loss = vars(cfg).get(cfg.stage)  # the settings of the stage's loss
    units = _units(cfg, data.order) if cfg.peft.reads in ("rows", "loss") else []
    made_of = [cfg.peft.model_dump(), loss.model_dump() if loss else None, cfg.train.batch_size, cfg.train.seed, units]
    key = content_hash(data.function(cfg), data.data.key, made_of, str(context.device.type), library_versions())

    def make() -> dict[str, Tensor]:
        """By every process, for none could wait for another so long; all take those of rank 0."""
        try:
            values = _make(context, data, objective, units, model)
        except UserError as error:
            raise of_all(error) from None
        return processes.told(lambda: values)

    found = cached_tensors(cache_root() / "starts" / f"{key}.safetensors", make, writes=writes, agree=processes.all_say)
    tokens = int(data.data.train.unit_tokens()[units].sum()) if units else 0
    say(
        f"peft.init: worked out on {len(units):,} rows ({tokens:,} tokens)"
        if units
        else "peft.init: worked out on the base's files"
    )
    return found


def _units(cfg: Any, order: BatchSampler) -> list[int]:
    """The first units that the run draws, each once."""
    return list(dict.fromkeys(order.drawn.tolist()))[: cfg.peft.init_rows]


def _make(
    context: Context, data: PreparedData, objective: Objective[PackedBatch], units: list[int], model: Any
) -> dict[str, Tensor]:
    cfg: Any = context.cfg
    size, function = cfg.train.batch_size, objective.training_loss or objective.loss
    batches = [objective.pack(data.data.train, units[i : i + size]).to(context.device) for i in range(0, len(units), size)]
    lm: Any = PackedLM(model, cfg.model.attention, "reference", cfg.train.packing) if batches else None
    if lm:
        check_packs(lm, cfg.peft)
    seed_step(cfg.train.seed, 0, 0)

    def read(batch: PackedBatch) -> None:
        context.check()
        lm(batch)

    def loss(batch: PackedBatch) -> Tensor:
        context.check()
        return function(lm, batch).total

    directory = resolve(data.start.source, data.base.revision).directory
    original = _Originals(directory) if cfg.quant.is_quantized else lambda name: None
    found = cfg.peft.first_values(model, Given(batches, read, loss, original, cfg.quant))
    if lm:  # the model is to be read by another one, which asks what it was loaded with
        model.set_attn_implementation(lm.own_attention)
    return found


class _Originals:
    """A layer's name -> its weight as the base's files have it, [out, in]; None where they have it otherwise than the model."""

    def __init__(self, directory: Any) -> None:
        self.entries = {entry.name: entry for entry in Checkpoint(directory).entries}
        model = without_values(directory)
        self.disk = OnDisk(model, self.entries) if model is not None else None

    def __call__(self, layer: str) -> Tensor | None:
        if self.disk is None or f"{layer}.weight" not in self.disk.state:
            return None
        name = self.disk.renamed(f"{layer}.weight")
        return None if name is None else self.entries[name].tensor(torch.float32)[...].float()
