"""What the language stages share beyond `StageRun`: tokens, references, held-out text, and the model that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from posttrain.batch import LossOutput, Metrics, PackedBatch
from posttrain.config.schema import DataConfig, Guarded, LanguageStage
from posttrain.console import say
from posttrain.data.chat.encoder import Encoder, chat_template
from posttrain.data.chat.loss_weights import PLAIN, weighing_of
from posttrain.data.collate import zero_weight
from posttrain.data.mixture import Curriculum, make_sampler, read_mixture
from posttrain.data.prepare import held_out_rows, prepare_set
from posttrain.data.selection import SELF, replayed, replays
from posttrain.errors import UserError
from posttrain.evaluation.held_out import EvalSet, Rows, Task, eval_batches, own_metrics, remember, set_metrics
from posttrain.models.language.reward_model import padding_apart
from posttrain.models.language.self_replay import Replay
from posttrain.models.language.tokenizer import load_tokenizer, stop_tokens
from posttrain.runs.cache import cache_root, cached_tensors
from posttrain.runs.directory import Run
from posttrain.runs.files import write_json, write_text
from posttrain.stages.dpo.reference import attach, digest_of, reference_logps, train_reference
from posttrain.stages.language.build import PreparedData, TrainableModel, build_model, frozen_dtype, save_result
from posttrain.stages.language.curriculum import perplexities
from posttrain.stages.language.ewc import CompositeCallback, EwcPenalty, fisher
from posttrain.stages.language.init import find_base, merged_start, resolve_start
from posttrain.stages.language.recompute import fit_memory
from posttrain.stages.language.summary import announce
from posttrain.stages.manifest import manifest_of
from posttrain.stages.stage import StageRun, content_hash, run_stage
from posttrain.training.objective import StepCallback, Update, everywhere


def run_language(cfg: LanguageStage, run: Run, task: Task, kind: type[LanguageRun] | None = None) -> dict[str, Any]:
    """Train to the end, or go on where a checkpoint left off; returns the manifest. kind: what does otherwise than `LanguageRun`.

    Raises UserError, RunError or Stopped.
    """
    return run_stage(cfg, run, lambda accelerator, stop: (kind or LanguageRun)(cfg, run, accelerator, stop, task))


@dataclass
class LanguageRun(StageRun[PreparedData, PackedBatch]):
    """One run of a language stage."""

    cfg: LanguageStage  # pyright: ignore[reportIncompatibleVariableOverride]
    task: Task
    rows: Rows = field(default_factory=dict)  # of the newest evaluation
    difficulty: NDArray[np.floating] | None = None  # of every unit, where a curriculum goes by it

    def read(self) -> PreparedData:
        return read_inputs(self.cfg, self.run.dir, self.accelerator, self.stop.check)

    def identity(self, inputs: PreparedData) -> dict[str, Any]:
        start = inputs.start
        return super().identity(inputs) | {
            "model.weights": inputs.base.digest,
            "init.weights": start.identity,
            "init.parents": [parent.digest for parent in start.parents],
        }

    def announce(self, inputs: PreparedData) -> None:
        announce(self.cfg, self.run.dir, inputs)

    def build(self, inputs: PreparedData) -> tuple[nn.Module, TrainableModel]:
        built = build_model(
            self.cfg, inputs.start, inputs.base, inputs.order.num_steps, self.accelerator.device, self.task.scores
        )
        module, built = self.assemble(built, inputs)
        fit_memory(self.cfg, module, built, inputs, self.accelerator.device)
        return module, built

    def assemble(self, built: TrainableModel, inputs: PreparedData) -> tuple[nn.Module, TrainableModel]:
        """The module that is trained, around `built.module`, which is what the run leaves."""
        return built.module, built

    def as_given(self, built: TrainableModel, inputs: PreparedData) -> AbstractContextManager[None]:
        """Without soft tokens that are still random."""
        return nullcontext() if inputs.start.mode == "continue" else built.module.without_prompt()

    def updates(self, step: int, module: nn.Module, inputs: PreparedData, table: Any) -> Iterator[Update[PackedBatch]]:
        batches = []
        for units in inputs.order.micro(step, self.accelerator.process_index):
            drawn = units or [0]
            batch = self.task.pack(inputs.data.train, drawn)
            batch = attach(batch, table[drawn].reshape(-1)) if table is not None else batch
            batches.append(batch if units else zero_weight(batch))
        metrics: Metrics = {}
        if self.difficulty is not None:
            drawn = torch.from_numpy(self.difficulty[inputs.order.step(step)])
            metrics["difficulty"] = (drawn.sum(), float(len(drawn)))
        yield Update(batches, metrics)

    def apply_curriculum(self, module: nn.Module, inputs: PreparedData) -> PreparedData:
        """With the order of a curriculum, for which the model is asked how hard the rows are to it."""
        cfg = self.cfg
        if not isinstance(cfg, Guarded) or not cfg.curriculum.by:
            return inputs
        train = inputs.data.train
        if cfg.curriculum.by == "length":
            self.difficulty = train.unit_lengths()
        else:
            device, name = self.accelerator.device, "difficulty"
            key = content_hash(self._identity(inputs), inputs.data.key, str(device))
            found = self.cached(name, key, lambda: {name: perplexities(module, train, self.task, device, self.stop.check)})
            self.difficulty = found[name].numpy()
        curriculum = Curriculum(self.difficulty, cfg.curriculum.beta_start, cfg.curriculum.beta_end)
        return replace(inputs, order=make_sampler(inputs.data, cfg.data, cfg.train, self.accelerator.num_processes, curriculum))

    def step_method(self, module: nn.Module, built: TrainableModel, inputs: PreparedData) -> StepCallback | None:
        """AdaLoRA's schedule and EWC's pull, where there are such."""
        found: list[StepCallback] = [built.schedule] if built.schedule else []
        cfg, plain = self.cfg, self.accelerator.unwrap_model(module)
        if isinstance(cfg, Guarded) and cfg.ewc.lam:
            importance = None
            if inputs.anchor is not None:
                trained = [cfg.peft.model_dump(), cfg.train.seed, EvalSet("", inputs.anchor, "").fingerprint()]
                text, device = inputs.anchor, self.accelerator.device
                key = content_hash(self._identity(inputs), trained)
                importance = self.cached("fisher", key, lambda: fisher(plain, text, device, self.stop.check))
            found.append(EwcPenalty(plain, importance, cfg.ewc.lam))
        return CompositeCallback(found) if len(found) > 1 else found[0] if found else None

    def checkpoint_gate(self, module: nn.Module, inputs: PreparedData) -> Callable[[int], bool] | None:
        """Whether general text is still within forgetting.budget, which is looked at before every checkpoint."""
        cfg = self.cfg
        if not isinstance(cfg, Guarded) or cfg.forgetting.budget is None:
            return None
        budget, stops = cfg.forgetting.budget, cfg.forgetting.action == "stop"
        general = [each for each in inputs.sets if each.name == "general"]

        def within(done: int) -> bool:
            assert self.loop
            found = set_metrics(module, general, None, cache_root(), self.accelerator.device, lambda: None)
            percent = forgetting(self.loop.state["before"]["general/loss"], found["general/loss"])
            self.loop.tracker.log(done, found | {"forgetting/percent": percent})
            if percent <= budget:
                self.loop.state["within"] = done
                return True
            say(f"step {done}: forgetting is {percent:+.2f} %, more than forgetting.budget={budget:g}%")
            return not stops

        return within

    def objective(self, module: nn.Module, batch: PackedBatch) -> LossOutput:
        return self.task.objective(module, batch)

    def where(self, inputs: PreparedData, row: int) -> str:
        return inputs.data.where(row)

    def references(self, module: nn.Module, inputs: PreparedData) -> tuple[list[PackedBatch], Any]:
        """Held-out batches, and the table of training references."""
        held_out = eval_batches(self.task, inputs.data.held_out)
        if not self.task.needs_reference:
            return held_out, None
        device, order = self.accelerator.device, inputs.order
        layout = [order.batch_size, order.grad_accum, order.world_size, [order.step(step) for step in order.first_seen()]]
        key = content_hash(self._identity(inputs), inputs.data.key, layout, str(device))
        train, name = inputs.data.train, "reference"
        make = partial(train_reference, module, train, order, self.accelerator, self.stop.check)
        table = self.cached(name, key, lambda: {name: make()})[name]
        self.keep("references", {"dpo.reference": digest_of(table)})
        return [attach(batch, reference_logps(module, batch, device)) for batch in held_out], table

    def measure(
        self, module: nn.Module, inputs: PreparedData, held_out: list[PackedBatch], done: int, check: Callable[[], None]
    ) -> dict[str, float]:
        found, self.rows = own_metrics(module, held_out, self.task, self.accelerator.device, check)
        return found

    def measure_more(self, module: nn.Module, inputs: PreparedData, trained: bool) -> dict[str, float]:
        identity = None if trained else self._identity(inputs)
        agree = partial(everywhere, self.accelerator)
        return set_metrics(module, inputs.sets, identity, cache_root(), self.accelerator.device, self.stop.check, agree)

    def cached(self, kind: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, computed once and kept in the cache under a name that says what it depends on. Every process must
        call it."""
        path = cache_root() / kind / f"{key}.safetensors"
        return cached_tensors(path, make, writes=self.accelerator.is_main_process, agree=partial(everywhere, self.accelerator))

    def _identity(self, inputs: PreparedData, base: str | None = None, adapter: str | None = None) -> str:
        """Names a function: base weights, what an adapter adds, and the precision in which both are computed."""
        cfg = self.cfg
        weights = [base or inputs.base.digest, inputs.start.identity if adapter is None else adapter]
        return content_hash(weights, cfg.quant.model_dump(), cfg.model.dtype, cfg.peft.output == "model", cfg.model.attention)

    def save(self, built: TrainableModel, inputs: PreparedData, state: dict[str, Any], after: dict[str, float]) -> dict[str, Any]:
        if self.task.scores:
            padding_apart(inputs.tokenizer, inputs.ends)
        result = save_result(self.cfg, self.run, built, self.accelerator, inputs)
        metrics = after | {f"{name}_before": value for name, value in state["before"].items()}
        if "general/loss" in after:
            metrics["forgetting/percent"] = forgetting(state["before"]["general/loss"], after["general/loss"])
        if self.accelerator.is_main_process:
            if self.rows:
                write_json(self.run.dir / "held_out.json", self.rows)
            remember(inputs.sets, after, self._identity(inputs, result.base_digest, result.adapter_digest), cache_root())
        return manifest_of(self.cfg, built, inputs, result.kind, state, metrics, self.accelerator)


def forgetting(before: float, after: float) -> float:
    """Percent by which a loss has risen."""
    return 100 * (after - before) / before


def read_inputs(cfg: LanguageStage, directory: Path, accelerator: Accelerator, check: Callable[[], None]) -> PreparedData:
    """Base, tokenizer and tokenised data: everything a mistake of the user can be in."""
    start, model = resolve_start(cfg), cfg.model
    base = find_base(start, model.revision)
    template = chat_template(model.chat_template) if model.chat_template else None
    tokenizer = load_tokenizer(start.tokenizer, base.revision, model.trust_remote_code, template)
    encoder = Encoder(tokenizer, stop_tokens(start.source, model.revision, tokenizer), weighing_of(cfg))
    sources = cfg.data
    ewc = cfg.ewc if isinstance(cfg, Guarded) and cfg.ewc.lam and cfg.ewc.importance == "fisher" else None
    own = str(directory / "self_replay.jsonl")
    if replays(sources) or (ewc and ewc.path == SELF):
        replay = Replay(start.source, base.revision, base.digest, tokenizer, encoder.end_tokens(), sources.replay)
        written = replay.write(cache_root(), frozen_dtype(cfg), accelerator.device, model.trust_remote_code, check)
        _copy(written, Path(own))
        sources = replayed(sources, own)
    data = read_mixture(sources, cfg.stage, encoder, cfg.example_length, cache_root())  # type: ignore[attr-defined]
    sets = [
        EvalSet(name, *prepare_set(path, cfg.eval.rows, encoder, cfg.eval.max_length))
        for name, path in (cfg.eval.sets or {}).items()
    ]
    if encoder.weighing.marker:
        sets += _spans(sources, cfg, encoder)
    order = make_sampler(data, sources, cfg.train, accelerator.num_processes)
    start, base = merged_start(cfg, start, base)
    anchor = None
    if ewc:
        anchor, kind = prepare_set(own if ewc.path == SELF else ewc.path, ewc.rows, encoder, ewc.max_length)
        if kind == "pairs":
            raise UserError(f"ewc.path: {ewc.path} holds pairs; give general text or conversations")
    return PreparedData(start, base, tokenizer, encoder.identity, encoder.end_tokens(), data, sets, order, anchor)


def _spans(data: DataConfig, cfg: LanguageStage, encoder: Encoder) -> list[EvalSet]:
    """The held-out rows with answers alone counting, for log p(answer | prompt, reasoning), and with all tokens alike."""
    kinds = {"answer": encoder.weighing.of_answers, "plain": PLAIN}
    rows = {name: encoder.weighing_as(weighing) for name, weighing in kinds.items()}
    found = {name: held_out_rows(data, "sft", encoder, cfg.example_length) for name, encoder in rows.items()}
    return [EvalSet(name, examples, "conversation") for name, examples in found.items() if len(examples)]


def _copy(file: Path, to: Path) -> None:
    """Once; the run's own, so that its manifest lists it."""
    if not to.exists():
        write_text(to, file.read_text(encoding="utf-8"))
