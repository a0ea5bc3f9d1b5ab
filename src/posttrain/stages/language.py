"""What the language stages share beyond `StageRun`: tokens, references, held-out text, and the model that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from posttrain.after.measure import EvalSet, Rows, Task, eval_batches, own_metrics, remember, set_metrics
from posttrain.batch import LossOutput, PackedBatch
from posttrain.cache import cache_root
from posttrain.config.schema import DataConfig, LanguageStage
from posttrain.data.choice import replayed, replays
from posttrain.data.conversations import Encoder, chat_template
from posttrain.data.mixture import make_order, read_mixture
from posttrain.data.packing import silent
from posttrain.data.prepare import held_out_rows, prepare_set
from posttrain.data.weights import PLAIN, weighing_of
from posttrain.models.causal import load_tokenizer, stop_tokens
from posttrain.models.replay import Replay
from posttrain.models.scorer import padding_apart
from posttrain.rundir import Run, write_json, write_text
from posttrain.stages.announce import announce
from posttrain.stages.assembly import StageRun, content_hash, run_stage
from posttrain.stages.build import Built, Inputs, build_model, frozen_dtype, save_result
from posttrain.stages.outcome import manifest_of
from posttrain.stages.recompute import spare_memory
from posttrain.stages.reference import attach, reference_logps, train_reference
from posttrain.stages.start import find_base, merged_start, resolve_start
from posttrain.train.parts import Update


def run_language(cfg: LanguageStage, run: Run, task: Task, kind: type[LanguageRun] | None = None) -> dict[str, Any]:
    """Train to the end, or go on where a checkpoint left off; returns the manifest. kind: what does otherwise than `LanguageRun`.

    Raises UserError, RunError or Stopped.
    """
    return run_stage(cfg, run, lambda accelerator, stop: (kind or LanguageRun)(cfg, run, accelerator, stop, task))


@dataclass
class LanguageRun(StageRun[Inputs, PackedBatch]):
    """One run of a language stage."""

    cfg: LanguageStage  # pyright: ignore[reportIncompatibleVariableOverride]
    task: Task
    rows: Rows = field(default_factory=dict)  # of the newest evaluation

    def read(self) -> Inputs:
        return read_inputs(self.cfg, self.run.dir, self.accelerator, self.stop.check)

    def identity(self, inputs: Inputs) -> dict[str, Any]:
        start = inputs.start
        return super().identity(inputs) | {
            "model.weights": inputs.base.digest,
            "init.weights": start.identity,
            "init.parents": [parent["digest"] for parent in start.parents],
        }

    def announce(self, inputs: Inputs) -> None:
        announce(self.cfg, self.run.dir, inputs)

    def build(self, inputs: Inputs) -> tuple[nn.Module, Built]:
        built = build_model(
            self.cfg, inputs.start, inputs.base, inputs.order.num_steps, self.accelerator.device, self.task.scores
        )
        module, built = self.assemble(built, inputs)
        spare_memory(self.cfg, module, built, inputs, self.accelerator.device)
        return module, built

    def assemble(self, built: Built, inputs: Inputs) -> tuple[nn.Module, Built]:
        """The module that is trained, around `built.module`, which is what the run leaves."""
        return built.module, built

    def as_given(self, built: Built, inputs: Inputs) -> AbstractContextManager[None]:
        """Without soft tokens that are still random."""
        return nullcontext() if inputs.start.mode == "continue" else built.module.without_prompt()

    def updates(self, step: int, module: nn.Module, inputs: Inputs, table: Any) -> Iterator[Update[PackedBatch]]:
        batches = []
        for units in inputs.order.micro(step, self.accelerator.process_index):
            drawn = units or [0]
            batch = self.task.pack(inputs.data.train, drawn)
            batch = attach(batch, table[drawn].reshape(-1)) if table is not None else batch
            batches.append(batch if units else silent(batch))
        yield Update(batches)

    def objective(self, module: nn.Module, batch: PackedBatch) -> LossOutput:
        return self.task.objective(module, batch)

    def references(self, module: nn.Module, inputs: Inputs) -> tuple[list[PackedBatch], Any]:
        """Held-out batches, and the table of training references."""
        held_out = eval_batches(self.task, inputs.data.held_out)
        if not self.task.needs_reference:
            return held_out, None
        device, order = self.accelerator.device, inputs.order
        layout = [order.batch_size, order.grad_accum, order.world_size, [order.step(step) for step in order.first_seen()]]
        key = content_hash(self._identity(inputs), inputs.data.key, layout, str(device))
        path = cache_root() / "reference" / f"{key}.safetensors"
        table = train_reference(module, inputs.data.train, order, self.accelerator, path, self.stop.check)
        return [attach(batch, reference_logps(module, batch, device)) for batch in held_out], table

    def measure(
        self, module: nn.Module, inputs: Inputs, held_out: list[PackedBatch], done: int, check: Callable[[], None]
    ) -> dict[str, float]:
        found, self.rows = own_metrics(module, held_out, self.task, self.accelerator.device, check)
        return found

    def measure_more(self, module: nn.Module, inputs: Inputs, trained: bool) -> dict[str, float]:
        identity = None if trained else self._identity(inputs)
        return set_metrics(module, inputs.sets, identity, cache_root(), self.accelerator.device, self.stop.check)

    def _identity(self, inputs: Inputs, base: str | None = None, adapter: str | None = None) -> str:
        """Names a function: base weights, what an adapter adds, and the precision in which both are computed."""
        cfg = self.cfg
        weights = [base or inputs.base.digest, inputs.start.identity if adapter is None else adapter]
        return content_hash(weights, cfg.quant.model_dump(), cfg.model.dtype, cfg.peft.saves == "model", cfg.model.attention)

    def save(self, built: Built, inputs: Inputs, state: dict[str, Any], after: dict[str, float]) -> dict[str, Any]:
        if self.task.scores:
            padding_apart(inputs.tokenizer, inputs.ends)
        result = save_result(self.cfg, self.run, built, self.accelerator, inputs)
        metrics = after | {f"{name}_before": value for name, value in state["before"].items()}
        if "general/loss" in after:
            start = state["before"]["general/loss"]
            metrics["forgetting/percent"] = 100 * (after["general/loss"] - start) / start
        if self.accelerator.is_main_process:
            if self.rows:
                write_json(self.run.dir / "held_out.json", self.rows)
            remember(inputs.sets, after, self._identity(inputs, result.base_digest, result.adapter_digest), cache_root())
        return manifest_of(self.cfg, built, inputs, result.kind, state, metrics, self.accelerator)


def read_inputs(cfg: LanguageStage, directory: Path, accelerator: Accelerator, check: Callable[[], None]) -> Inputs:
    """Base, tokenizer and tokenised data: everything a mistake of the user can be in."""
    start, model = resolve_start(cfg), cfg.model
    base = find_base(start, model.revision)
    template = chat_template(model.chat_template) if model.chat_template else None
    tokenizer = load_tokenizer(start.tokenizer, base.revision, model.trust_remote_code, template)
    encoder = Encoder(tokenizer, stop_tokens(start.source, model.revision, tokenizer), weighing_of(cfg))
    sources = cfg.data
    if replays(sources):
        replay = Replay(start.source, base.revision, base.digest, tokenizer, encoder.end_tokens(), sources.replay)
        written = replay.write(cache_root(), frozen_dtype(cfg), accelerator.device, model.trust_remote_code, check)
        sources = replayed(sources, str(_copied(written, directory / "self_replay.jsonl")))
    data = read_mixture(sources, cfg.stage, encoder, cfg.example_length, cache_root())  # type: ignore[attr-defined]
    sets = [
        EvalSet(name, *prepare_set(path, cfg.eval.rows, encoder, cfg.eval.max_length))
        for name, path in (cfg.eval.sets or {}).items()
    ]
    if encoder.weighing.marker:
        sets += _spans(sources, cfg, encoder)
    order = make_order(data, sources, cfg.train, accelerator.num_processes)
    start, base = merged_start(cfg, start, base)
    return Inputs(start, base, tokenizer, encoder.identity, encoder.end_tokens(), data, sets, order)


def _spans(data: DataConfig, cfg: LanguageStage, encoder: Encoder) -> list[EvalSet]:
    """The held-out rows with answers alone counting, for log p(answer | prompt, reasoning), and with all tokens alike."""
    kinds = {"answer": encoder.weighing.of_answers, "plain": PLAIN}
    rows = {name: encoder.weighing_as(weighing) for name, weighing in kinds.items()}
    found = {name: held_out_rows(data, "sft", encoder, cfg.example_length) for name, encoder in rows.items()}
    return [EvalSet(name, examples, "conversation") for name, examples in found.items() if len(examples)]


def _copied(file: Path, to: Path) -> Path:
    """A copy, made once; the run's own, so that its manifest lists it."""
    if not to.exists():
        write_text(to, file.read_text())
    return to
