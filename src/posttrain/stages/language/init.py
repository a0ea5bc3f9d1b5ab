"""Where a stage begins: a bare model, or what a finished run left, and what becomes of that run's adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config.schema import LanguageStage
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.models.hub import BaseInfo, digest, resolve
from posttrain.models.language.loading import base_digest
from posttrain.models.language.reward_model import HEAD, saved_head
from posttrain.models.language.tokenizer import load_tokenizer, make_encoder
from posttrain.models.peft.kinds import is_plain_sum, leaves_the_base, odd_setting, require_kind, way_on
from posttrain.models.peft.merge import merged_directory
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.earlier import same_base
from posttrain.runs.manifest import Parent


@dataclass(frozen=True)
class InitSource:
    """name: the base as people call it. source: the weights to load (a directory, hub id or built-in name). adapter: a
    finished run's adapter on them, or None; mode: what becomes of it (stack, merge, continue), or ''.

    tokenizer: where the tokenizer comes from. scorer: where a reward model's head is, if this is one. template: what has rendered
    the rows of the run, where its manifest says it.
    identity: sha256 of what the adapter adds; the base has its own digest. place: by which it is opened again. field: the setting
    that names it.
    """

    name: str
    source: str
    tokenizer: str
    adapter: Path | None = None
    mode: str = ""
    base_digest: str | None = None
    identity: str = ""
    parents: list[Parent] = field(default_factory=list[Parent])
    scorer: Path | None = None
    template: str | None = None
    place: str = ""
    field: str = "model.name"
    revision: str | None = None  # of the base of an adapter of others, as it says


def resolve_reward(cfg: LanguageStage, run: str, field: str, tokenizer_hash: str, starts_critic: bool = False) -> InitSource:
    """A reward model's run, given in `field`, as where a scorer begins. starts_critic: a value model begins there too, and is
    trained.

    One of others is a classifier of transformers, or peft's adapter of one. Raises UserError for anything else, and for one that
    reads other tokens than the policy writes.
    """
    artifact = open_artifact(run, field)
    if not artifact.reward_head:
        what = f"a {artifact.stage} run" if artifact.is_run else "no reward model"
        raise UserError(f"{field}: {run} is {what}; give what posttrain rm has made, or a classifier with one label")
    artifact.verified()
    _check_head(artifact, field)
    if _tokenizer_hash(artifact) != tokenizer_hash:
        raise UserError(
            f"{field}: {run} has another tokenizer or chat template than the policy; give one made from the same init"
        )
    if not artifact.is_run:
        say(f"{field}: {run} is a classifier of others; what it says of an answer is read at the answer's end of turn")
    role = "reward" if field == "init_reward" else "gold"
    if artifact.kind == "model":
        return source_of(artifact, role, "")
    adapter = artifact.adapter.whole
    stackable = cfg.peft.is_additive and is_plain_sum(adapter)
    if starts_critic and not stackable and (reason := require_kind(adapter, field).objection(adapter)):
        raise UserError(f"{field}: its adapter cannot be merged ({reason}), for the value model to start from; give another")
    found = source_of(artifact, role, "stack" if stackable else "merge")
    return found if found.base_digest else replace(found, base_digest=base_digest(artifact))


def _check_head(artifact: Artifact, field: str) -> None:
    """Raises UserError for one that has several scores, or none."""
    try:
        labels = len(saved_head(artifact.reward_head or artifact.weights))
    except KeyError:
        raise UserError(f"{field}: {artifact.name} has no {HEAD}.weight, a classifier's head; give one that has") from None
    if labels != 1:
        raise UserError(
            f"{field}: {artifact.name} has {labels} labels; give a classifier with one, or reward.function=classifier"
        )


def _tokenizer_hash(artifact: Artifact) -> str:
    """Of a run as its manifest has it."""
    if artifact.manifest:
        return artifact.manifest.tokenizer.hash if artifact.manifest.tokenizer else ""
    tokenizer = load_tokenizer(artifact.tokenizer, None, None, None)
    return make_encoder(tokenizer, artifact.source, artifact.base.revision).identity


def source_of(artifact: Artifact, role: str, mode: str) -> InitSource:
    """mode: what becomes of it where it is an adapter."""
    base, parents, head = artifact.base, artifact.parents(role), artifact.reward_head
    told = artifact.manifest.template if artifact.manifest else None
    template, place = told.rows if told else None, str(artifact.directory or artifact.name)
    if artifact.kind == "model":
        return InitSource(
            base.name, base.path, artifact.tokenizer, parents=parents, scorer=head, template=template, place=place,
            field=artifact.field,
        )  # fmt: skip
    return InitSource(
        base.name, base.path, artifact.tokenizer, artifact.weights, mode, base.digest, artifact.digest, parents, head, template,
        place, artifact.field, None if artifact.is_run else artifact.base.revision,
    )  # fmt: skip


def resolve_start(cfg: LanguageStage, weights: bool = True) -> InitSource:
    """weights: whether a finished run's files are checked against its manifest.

    Raises UserError for an `init` that is no finished run, whose files are not those its manifest names, or whose adapter
    cannot become what `chain.mode` says.
    """
    if cfg.init is None:
        if cfg.chain.mode == "continue":
            raise UserError("chain.mode: continue goes on with an adapter, and there is no init; give init=RUN, or leave it out")
        return InitSource(cfg.model.name, cfg.model.name, cfg.model.name)
    artifact = open_artifact(cfg.init, "init").supported()
    if weights:
        artifact.verified()
    if artifact.kind == "model" and cfg.chain.mode == "continue":
        raise UserError(f"chain.mode: continue goes on with an adapter, and init is a whole model ({cfg.init}); leave it out")
    if artifact.is_pipeline:
        raise UserError(f"init: {cfg.init} is of a diffusion model, which {cfg.stage} cannot start from")
    if artifact.reward_head and cfg.stage != "rm":
        raise UserError(f"init: {cfg.init} is a reward model, which writes nothing; give the run that it was made from")
    return source_of(artifact, "init", chain_mode(cfg, artifact.adapter.whole) if artifact.kind == "adapter" else "")


def chain_mode(cfg: LanguageStage, parent: dict[str, Any]) -> str:
    """What becomes of an adapter under this stage. parent: its adapter_config.json."""
    asked, method, kind = cfg.chain.mode, cfg.peft.name, require_kind(parent, "init")
    stackable = cfg.peft.is_additive and is_plain_sum(parent) and not cfg.peft.reads
    mode = ("stack" if stackable else "merge") if asked == "auto" else asked
    if mode != "merge" and cfg.peft.reads:
        raise UserError(
            f"chain.mode: what is trained by {cfg.peft.named} begins by what the bare base computes, without init's adapter; say "
            "chain.mode=merge"
        )
    if mode == "stack" and not stackable:
        which = f"peft={method}" if not cfg.peft.is_additive else f"init's {kind.name} adapter"
        raise UserError(f"chain.mode: stack needs changes that are sums, which {which} is not; {way_on(kind, parent)}")
    if mode == "continue" and not leaves_the_base(parent):
        odd = odd_setting(parent, parent.keys())
        raise UserError(f"chain.mode: continue writes an adapter's own tensors alone; {odd}; {way_on(kind, parent)}")
    if mode == "continue" and not (cfg.peft.can_continue and cfg.peft.saves is kind):
        raise UserError(f"chain.mode: peft={cfg.peft.named} cannot go on with init's {kind.name} adapter; {way_on(kind, parent)}")
    if mode == "merge" and (reason := kind.objection(parent)):
        raise UserError(f"init: its adapter cannot be merged ({reason}); {way_on(kind, parent)}")
    return mode


def find_base(start: InitSource, revision: str | None, weights: bool = True) -> BaseInfo:
    """What a stage's start means, and the digest of its weights; fetches files, loads nothing. weights: False leaves those alone,
    and the digest empty. UserError where a finished run's adapter belongs to other weights."""
    source = resolve(start.source, revision or start.revision, weights, start.field)
    base = BaseInfo(start.name, source.path, source.revision, digest(source.directory) if weights else "")
    if start.adapter and not start.base_digest:
        say(f"init: an adapter of others; its base is {start.name}, as it says; whether that has changed is not known")
    if weights and start.base_digest and not same_base(start.base_digest, base.digest):
        raise UserError(f"init: its adapter belongs to another base than {base.path} (digests differ); give the run's own base")
    return base


def merged_start(cfg: LanguageStage, start: InitSource, base: BaseInfo) -> tuple[InitSource, BaseInfo]:
    """With chain.mode=merge an adapter's base is the merged model, kept in the cache; full training merges in memory."""
    if start.mode != "merge" or cfg.peft.output == "model":
        return start, base
    assert start.adapter
    directory = merged_directory(base, start.adapter, start.identity)
    merged = replace(start, source=str(directory), adapter=None, base_digest=None, identity="")
    return merged, BaseInfo(f"{base.name} merged with {cfg.init}", str(directory), None, digest(directory))
