"""1. What a language stage reads before a weight is loaded: base, tokenizer, tokenised rows, and what it will be measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from posttrain.config.choices import is_reward_function
from posttrain.config.schema import DataConfig, Guarded, LanguageStage
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.loss_weights import PLAIN, weighing_of
from posttrain.data.chat.options import options_of
from posttrain.data.collate import BatchSampler
from posttrain.data.examples import Examples
from posttrain.data.mixture import Mixture, make_sampler, read_mixture
from posttrain.data.prepare import held_out_rows, prepare_set
from posttrain.data.row_use import RowUse
from posttrain.data.selection import SELF, replayed, replays
from posttrain.errors import UserError
from posttrain.evaluation.held_out import EvalSet
from posttrain.models.hub import BaseInfo, resolve
from posttrain.models.kernels.attention import check_attention
from posttrain.models.language.architecture import config_of
from posttrain.models.language.new_tokens import NewToken, add_tokens, embedding_rows, line_of
from posttrain.models.language.self_replay import Replay
from posttrain.models.language.tokenizer import load_tokenizer, make_encoder
from posttrain.models.offload.activations import check_offload
from posttrain.models.peft.tokens import size_of
from posttrain.models.trust import pin_of
from posttrain.runs.artifact import open_artifact
from posttrain.runs.cache_place import cache_root
from posttrain.runs.files import write_text
from posttrain.runs.identity import content_hash
from posttrain.runs.manifest import Parent, TemplateRecord
from posttrain.stages.language.answers import HeldOutPrompts, held_out_prompts
from posttrain.stages.language.checkpoint import check_checkpoint
from posttrain.stages.language.init import InitSource, find_base, merged_start, resolve_start
from posttrain.stages.language.learning_rate import auto_rate
from posttrain.stages.language.shapes import check_shapes
from posttrain.stages.language.summary import lines_of, lines_of_template
from posttrain.stages.language.tasks import TasksDuring, tasks_during
from posttrain.stages.spec import spec_of
from posttrain.stages.steps import Context, Prepared


@dataclass(frozen=True)
class Opened:
    """A stage's start as far as words go: which base, and how rows become tokens for it."""

    start: InitSource
    base: BaseInfo
    tokenizer: Any
    encoder: Encoder
    new_tokens: Sequence[NewToken] = ()
    rows: int = 0


@dataclass(frozen=True)
class PreparedData:
    """All that is read before a weight is loaded. ends: ids of the tokens that end an answer. ewc_text: general text whose
    Fisher is wanted."""

    start: InitSource
    base: BaseInfo
    tokenizer: Any
    tokenizer_hash: str
    ends: list[int]
    data: Mixture
    sets: list[EvalSet]
    order: BatchSampler
    ewc_text: Examples | None = None
    new_tokens: Sequence[NewToken] = ()
    template: TemplateRecord = field(default=TemplateRecord(rows="none", texts="none"))
    prompts: HeldOutPrompts | None = None
    tasks: TasksDuring | None = None

    def function(self, cfg: LanguageStage, base: str | None = None, adapter: str | None = None) -> str:
        """Names the function that the start computes: base weights, what an adapter adds, and the precision of both. base,
        adapter: digests of others than the start's."""
        weights = [base or self.base.digest, self.start.identity if adapter is None else adapter]
        model = cfg.model
        computed: list[Any] = [model.dtype, cfg.peft.output == "model", model.attention, model.kernels, cfg.train.packing]
        if cfg.peft.changes_start:
            computed.append(cfg.peft.model_dump())
        return content_hash(weights, cfg.quant.model_dump(), *computed, *self.new_tokens)


def open_language(cfg: LanguageStage, weights: bool = True) -> Opened:
    """weights: whether those of the base will be wanted, and are fetched, hashed and checked. Raises UserError."""
    start, model = resolve_start(cfg, weights), cfg.model
    base = find_base(start, model.revision, weights)
    tokenizer = load_tokenizer(start.tokenizer, base.revision, pin_of(model), model.chat_template)
    config = config_of(resolve(start.source, model.revision, weights=False).directory, pin_of(model))
    inherited = size_of(start.adapter) if start.adapter else 0
    wanted = None if model.add_tokens else max(inherited, *tokenizer.get_vocab().values()) + 1
    rows = max(inherited, embedding_rows(config, wanted, pin_of(model)))
    tokens = add_tokens(tokenizer, model.add_tokens or (), rows)
    how = weighing_of(cfg), options_of(cfg.data), start.template
    encoder = make_encoder(tokenizer, start.source, model.revision, *how)
    return Opened(start, base, tokenizer, encoder, tokens, rows)


def template_of(data: Mixture, encoder: Encoder, documents: bool) -> TemplateRecord:
    """What has rendered most of the rows, and prompts that are texts; documents are rows of neither kind, and change nothing."""
    parts, texts = [part.stats for part in data.parts], encoder.options.template
    rendered = texts if documents else 2 * sum(part.templated for part in parts) > sum(part.rows for part in parts)
    return TemplateRecord(rows="chat" if rendered else "none", texts="chat" if texts else "none")


def prepare_language(context: Context) -> Prepared[PreparedData]:
    """Raises UserError for everything a mistake of the user can be in."""
    cfg: LanguageStage = context.cfg
    if context.weights:  # a plan may be of another machine
        check_attention(cfg.model.attention, context.device)
        check_offload(cfg.train.offload, context.device)
    opened = open_language(cfg, context.weights)
    base_dir = resolve(opened.start.source, cfg.model.revision, weights=False).directory
    check_shapes(cfg, base_dir, bool(opened.new_tokens or (opened.start.adapter and size_of(opened.start.adapter))))
    check_checkpoint(cfg, opened.start, opened.base, context.weights)
    sources, own_text = _with_replay(context, opened)
    data = read_mixture(sources, rows_of(cfg), opened.encoder, cfg.example_length, cache_root())
    order = make_sampler(data, sources, cfg.train, context.processes)
    cfg.peft.check_steps(order.num_steps)
    start, base = opened.start, opened.base
    sets: list[EvalSet] = []
    ewc_text = None
    if context.weights:
        sets = eval_sets(cfg, sources, opened.encoder)
        start, base = merged_start(cfg, start, base)
        ewc_text = _ewc_text(cfg, opened.encoder, own_text)
    template = template_of(data, opened.encoder, rows_of(cfg).examples == "documents")
    found = PreparedData(
        start, base, opened.tokenizer, opened.encoder.identity, opened.encoder.end_tokens(), data, sets, order, ewc_text,
        opened.new_tokens, template, held_out_prompts(cfg, data.held_out, opened.tokenizer, opened.encoder.end_tokens()),
        tasks_during(cfg, opened.tokenizer, template.rows == "chat") if context.weights else None,
    )  # fmt: skip
    identity = {
        "data.content": data.content,
        "train.processes": context.processes,
        "model.weights": base.digest,
        "init.weights": start.identity,
        "init.parents": [parent.digest for parent in start.parents],
    }
    lines = lines_of(cfg, context.directory, start, base, data, order, opened.tokenizer)
    if opened.new_tokens:
        lines.insert(1, line_of(opened.new_tokens, opened.rows))
    lines[-1:-1] = [*spec_of(cfg.stage).lines_of(cfg), *lines_of_parents(cfg, template.rows)]
    if found.tasks:
        lines.insert(-1, f"eval.{found.tasks.asking.line(found.tasks.chat)}")
    if cfg.optim.lr != "auto":
        return Prepared(found, identity, order, lines, data.where)
    rate = auto_rate(cfg, order.num_steps, context.processes, resolve(base.path, base.revision, weights=False).directory)
    lines.insert(-1, rate.line)
    return Prepared(found, identity | {"optim.lr": rate.value}, order, lines, data.where, rate.value)


def lines_of_parents(cfg: LanguageStage, template: str) -> list[str]:
    """A warning for each run that the stage goes on from, or is scored by, whose rows were rendered otherwise. template: what has
    rendered those of this stage."""
    lines: list[str] = []
    for parent in spec_of(cfg.stage).parents:
        named: Any = reduce(lambda section, name: getattr(section, name, None), parent.key.split("."), cfg)
        if isinstance(named, str) and not is_reward_function(named):  # else a function
            manifest = open_artifact(named, parent.key).manifest
            told = manifest.template if manifest else None
            lines += lines_of_template(template, told.rows if told else None, parent.key)
    return lines


def rows_of(cfg: LanguageStage) -> RowUse:
    """What the stage makes of rows."""
    return spec_of(cfg.stage).rows_of(cfg)


def eval_sets(cfg: LanguageStage, sources: DataConfig, encoder: Encoder) -> list[EvalSet]:
    """The sets of `eval.sets`, and of marked reasoning the held-out rows with answers alone counting."""
    sets: list[EvalSet] = []
    for name, path in (cfg.eval.sets or {}).items():
        found = prepare_set(path, cfg.eval.rows, encoder, cfg.eval.max_length)
        sets.append(EvalSet(name, found.examples, found.kind))
    return sets + (_spans(sources, cfg, encoder) if encoder.weighing.marker else [])


def _spans(data: DataConfig, cfg: LanguageStage, encoder: Encoder) -> list[EvalSet]:
    """The held-out rows with answers alone counting, for log p(answer | prompt, reasoning), and with all tokens alike."""
    kinds = {"answer": encoder.weighing.of_answers, "plain": PLAIN}
    rows = {name: encoder.weighing_as(weighing) for name, weighing in kinds.items()}
    found = {name: held_out_rows(data, rows_of(cfg), encoder, cfg.example_length) for name, encoder in rows.items()}
    return [EvalSet(name, examples, "conversation") for name, examples in found.items() if len(examples)]


def _with_replay(context: Context, opened: Opened) -> tuple[DataConfig, str]:
    """The sources with the base model's own texts in place of `self`, which it writes first, and where those texts are."""
    cfg: LanguageStage = context.cfg
    own = context.directory / "self_replay.jsonl"
    if not context.weights or not (replays(cfg.data) or (_wants_fisher(cfg) and cfg.ewc.path == SELF)):  # type: ignore[attr-defined]
        return cfg.data, str(own)
    start, base = opened.start, opened.base
    replay = Replay(
        start.source,
        base.revision,
        base.digest,
        opened.tokenizer,
        opened.encoder.end_tokens(),
        cfg.data.replay,
        cfg.model.kernels,
    )
    texts = replay.texts(cache_root(), frozen_dtype(cfg), context.device, pin_of(cfg.model), context.check)
    own = context.own("self_replay.jsonl", texts)
    _write(texts, own)
    return replayed(cfg.data, str(own)), str(own)


def _wants_fisher(cfg: LanguageStage) -> bool:
    return isinstance(cfg, Guarded) and bool(cfg.ewc.lam) and cfg.ewc.importance == "fisher"


def _ewc_text(cfg: LanguageStage, encoder: Encoder, own: str) -> Examples | None:
    if not isinstance(cfg, Guarded) or not _wants_fisher(cfg):
        return None
    ewc = cfg.ewc
    found = prepare_set(own if ewc.path == SELF else ewc.path, ewc.rows, encoder, ewc.max_length)
    if found.kind == "pairs":
        raise UserError(f"ewc.path: {ewc.path} holds pairs; give general text or conversations")
    return found.examples


def _write(texts: list[str], to: Path) -> None:
    """Once, as JSONL; the run's own, so that its manifest lists it."""
    if not to.exists():
        write_text(to, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def with_order(data: PreparedData, order: BatchSampler) -> PreparedData:
    """The data with another order of its units."""
    return replace(data, order=order)


def with_parents(prepared: Prepared[PreparedData], more: list[Parent]) -> Prepared[PreparedData]:
    """With the runs, beside `init`, that this one is made from."""
    start = prepared.data.start
    parents = [*start.parents, *more]
    data = replace(prepared.data, start=replace(start, parents=parents))
    identity = prepared.identity | {"init.parents": [parent.digest for parent in parents]}
    return replace(prepared, data=data, identity=identity)


def frozen_dtype(cfg: LanguageStage) -> str:
    """Of a model that is only read."""
    return "bfloat16" if cfg.model.dtype == "auto" else cfg.model.dtype
