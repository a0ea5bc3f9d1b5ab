"""Where a stage begins: a bare model, or what a finished run left, and what becomes of that run's adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.config.schema import LanguageStage, Ppo
from posttrain.errors import UserError
from posttrain.models.hub import BaseInfo, digest, resolve
from posttrain.models.peft.merge import UNMERGEABLE, merged_directory
from posttrain.runs.artifact import AdapterConfig, Artifact, open_artifact
from posttrain.runs.manifest import Parent

SAVED_AS = {
    "dora": "LORA",
    "vera": "VERA",
    "adapter": "BOTTLENECK",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
}  # by method, peft's type of what a run of it leaves; sums are all saved as LORA


@dataclass(frozen=True)
class InitSource:
    """name: the base as people call it. source: the weights to load (a directory, hub id or built-in name). adapter: a
    finished run's adapter on them, or None; mode: what becomes of it (stack, merge, continue), or ''.

    tokenizer: where the tokenizer comes from. scorer: where a reward model's head is, if this is one.
    identity: sha256 of what the adapter adds; the base has its own digest.
    """

    name: str
    source: str
    tokenizer: str
    adapter: Path | None = None
    mode: str = ""
    base_digest: str | None = None
    identity: str = ""
    parents: list[Parent] = field(default_factory=list)
    scorer: Path | None = None


def resolve_reward(cfg: Ppo, run: str, field: str, tokenizer_hash: str) -> InitSource:
    """A reward model's run, given in `field`, as where a scorer begins. Raises UserError for anything else, and for one that
    reads other tokens than the policy writes."""
    artifact = open_artifact(run, field)
    manifest = artifact.manifest
    if not manifest or not artifact.reward_head:
        what = f"a {manifest.stage} run" if manifest else "no finished run"
        raise UserError(f"{field}: {run} is {what}; give what posttrain rm has made")
    artifact.verified()
    if not manifest.tokenizer or manifest.tokenizer.hash != tokenizer_hash:
        raise UserError(
            f"{field}: {run} has another tokenizer or chat template than the policy; give one made from the same init"
        )
    stackable = artifact.kind == "adapter" and cfg.peft.is_additive and _is_plain_lora(artifact.adapter)
    return source_of(artifact, "reward" if field == "init_reward" else "gold", "stack" if stackable else "merge")


def source_of(artifact: Artifact, role: str, mode: str) -> InitSource:
    """mode: what becomes of it where it is an adapter."""
    base, parents, head = artifact.base, artifact.parents(role), artifact.reward_head
    if artifact.kind == "model":
        return InitSource(base.name, base.path, artifact.tokenizer, parents=parents, scorer=head)
    return InitSource(
        base.name, base.path, artifact.tokenizer, artifact.weights, mode, base.digest, artifact.digest, parents, head
    )  # fmt: skip


def resolve_start(cfg: LanguageStage) -> InitSource:
    """Raises UserError for an `init` that is no finished run, whose files are not those its manifest names, or whose adapter
    cannot become what `chain.mode` says."""
    if cfg.init is None:
        return InitSource(cfg.model.name, cfg.model.name, cfg.model.name)
    artifact = open_artifact(cfg.init, "init").supported().verified()
    if artifact.is_pipeline:
        raise UserError(f"init: {cfg.init} is of a diffusion model, which {cfg.stage} cannot start from")  # type: ignore[attr-defined]
    if artifact.reward_head and cfg.stage != "rm":  # type: ignore[attr-defined]
        raise UserError(f"init: {cfg.init} is a reward model, which writes nothing; give the run that it was made from")
    return source_of(artifact, "init", chain_mode(cfg, artifact.adapter) if artifact.kind == "adapter" else "")


def _is_plain_lora(adapter: AdapterConfig) -> bool:
    return adapter.peft_type == "LORA" and not adapter.use_dora


def chain_mode(cfg: LanguageStage, parent: AdapterConfig) -> str:
    """What becomes of an adapter under this stage."""
    asked, method, kind, dora = cfg.chain.mode, cfg.peft.method, parent.peft_type, parent.use_dora
    stackable = cfg.peft.is_additive and _is_plain_lora(parent)
    mode = ("stack" if stackable else "merge") if asked == "auto" else asked
    if mode == "stack" and not stackable:
        which = f"peft={method}" if not cfg.peft.is_additive else f"init's {'dora' if dora else kind.lower()} adapter"
        raise UserError(f"chain.mode: stack needs changes that are sums, which {which} is not; say chain.mode=merge")
    if mode == "continue":
        wanted = "LORA" if cfg.peft.is_additive else SAVED_AS.get(method)
        if method in ("pissa", "adalora", "ptuning") or kind != wanted or dora != (method == "dora"):
            raise UserError(f"chain.mode: peft={method} cannot go on with init's {kind.lower()} adapter; say chain.mode=merge")
    if mode == "merge" and kind in UNMERGEABLE:
        raise UserError(f"init: its adapter cannot be merged ({UNMERGEABLE[kind]}); say chain.mode=continue with the same peft=")
    return mode


def find_base(start: InitSource, revision: str | None) -> BaseInfo:
    """What a stage's start means, and the digest of its weights; fetches files, loads nothing. UserError where a finished
    run's adapter belongs to other weights."""
    source = resolve(start.source, revision)
    base = BaseInfo(start.name, source.path, source.revision, digest(source.directory))
    if start.base_digest and start.base_digest != base.digest:
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
