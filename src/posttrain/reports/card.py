"""README.md beside a result's weights: its model card, as the hub reads it. Made of the manifest and the config alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, RepoCard, try_to_load_from_cache

from posttrain.config.metrics import direction, show
from posttrain.models.builtin import BUILTIN, HUB_ID
from posttrain.reports.run_records import before_and_after, duration
from posttrain.runs.directory import read_config
from posttrain.runs.files import write_text
from posttrain.runs.manifest import CARD, Base, Manifest, read_manifest

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SETTINGS = ("model", "data", "train", "optim", "peft", "quant")
_OF_PEFT = """from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "."  # this directory, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(where)
base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(where).base_model_name_or_path)
base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))
model = PeftModel.from_pretrained(base, where)
"""
_OF_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

where = "."  # this directory, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(where)
model = AutoModelForCausalLM.from_pretrained(where)
"""
_ANSWER = """prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_GOES_ON = """prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0], skip_special_tokens=True))
"""


def write_card(run: Path) -> Path:
    """Write the card of a finished run. It is for people to change, so the manifest does not list it.

    Absolute paths are cut to their last part, and what looks like a secret is hidden: a card is made to be shown.
    """
    manifest = read_manifest(run)
    card = run / manifest.weights.path / CARD
    write_text(card, f"---\n{_head(manifest).to_yaml()}\n---\n\n{_body(run, manifest)}")
    ModelCard(card.read_text(encoding="utf-8"))  # the hub's library reads the head again, or says why not
    return card


def hub_name(base: Base) -> str | None:
    """The base's name on the hub; None where it is a directory, or made on the spot. Wherever it is asked: a directory's path is
    absolute, and its name may look like one of the hub from elsewhere."""
    if base.name in BUILTIN:
        return HUB_ID if base.name == "smollm2" else None
    here = Path(base.path).is_absolute() or Path(base.name).exists()
    return base.name if _HUB.fullmatch(base.name) and not here else None


def _head(manifest: Manifest) -> ModelCardData:
    method = manifest.peft.method
    kind = "diffusers" if manifest.pipeline else "peft" if manifest.weights.kind == "adapter" else "transformers"
    of_hub = {each.source for each in manifest.data if (each.fingerprint or "").startswith("hub:")}
    task = "text-to-image" if manifest.pipeline else "text-classification" if manifest.stage == "rm" else "text-generation"
    tags = ["posttrain", manifest.stage, *([method] if method != "none" else [])]
    extra: dict[str, Any] = dict(_terms(manifest.base))
    return ModelCardData(
        base_model=hub_name(manifest.base),
        datasets=sorted(of_hub) or None,
        library_name=kind,
        license=said if len(said := _license(manifest.base).split(", ")) > 1 else said[0],  # pyright: ignore
        pipeline_tag=task,
        tags=tags,
        **extra,
    )


def _card_of(base: Base) -> Path | None:
    """The base's own card, where that lies beside it or was fetched with it."""
    return Path(base.path) / CARD if Path(base.path).is_dir() else _cached_card(hub_name(base) or "", "model", base.revision)


def _license(base: Base) -> str:
    """As the base's own card says it; else the hub's word for one that it does not know."""
    return _said_by(_card_of(base))


def _terms(base: Base) -> dict[str, str]:
    """The name of a licence that is none of the hub's, and where it stands: beside the base, if that is no address."""
    found, name = _head_of(_card_of(base)), hub_name(base)
    terms = {key: str(found[key]) for key in ("license_name", "license_link") if found.get(key)}
    link = terms.get("license_link", "https://")
    if not link.startswith("https://"):
        terms["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return terms if name or link.startswith("https://") else {"license_name": terms.get("license_name", "other")}


def _license_of_data(source: str) -> str:
    """As the card says it that lies beside the rows, or was fetched with them from the hub."""
    place = Path(source).expanduser()
    if place.exists():
        return _said_by((place if place.is_dir() else place.parent) / CARD)
    return _said_by(_cached_card(source, "dataset", None))


def _cached_card(name: str, kind: str, revision: str | None) -> Path | None:
    """Of a repository of the hub, where it is on this disk."""
    if not _HUB.fullmatch(name):
        return None
    found = try_to_load_from_cache(name, CARD, repo_type=kind, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _head_of(card: Path | None) -> dict[str, Any]:
    try:
        return RepoCard.load(card, ignore_metadata_errors=True).data.to_dict() if card and card.is_file() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _said_by(card: Path | None) -> str:
    said = _head_of(card).get("license") or "unknown"
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said)


def _body(run: Path, manifest: Manifest) -> str:
    base, method, name = manifest.base, manifest.peft.method, run.resolve().name
    held = f", its base held in {manifest.quant.method}" if manifest.quant.method != "none" else ""
    what = "the whole model" if method == "none" else method
    amount, unit = manifest.amount
    license_ = _license(base)
    said = "unknown here: look up that of the base" if license_ == "unknown" else f"{license_}, as the base's card says"
    lines = [
        f"# {name}",
        f"{hub_name(base) or _named(base.name)} after `{manifest.stage}` with {what}{held}, by posttrain.",
        f"- **Trained**: {manifest.steps:,} steps, {amount:,} {unit}, {duration(float(manifest.seconds))}, seed {manifest.seed}, "
        f"{manifest.dtype} on {manifest.device or 'an unknown device'}",
        *(f"- **From**: a run of role {parent.role}, `{_named(parent.path)}`" for parent in manifest.parents),
        *(f"- **Sum**: {term['weight']:+.4g} × `{_named(str(term['run']))}`" for term in manifest.sum),
        f"- **Licence**: {said}",
        "",
    ]
    parts = [_data(manifest), _figures(manifest), _loading(run, manifest), _reproduce(run, manifest)]
    return "\n".join(lines).replace("\n- ", "\n\n- ", 1) + "\n" + "\n\n".join(part for part in parts if part) + "\n"


def _data(manifest: Manifest) -> str:
    if not manifest.data:
        return ""
    rows = ["## Data", "", "| source | share | rows | tokens | licence |", "|---|---|---|---|---|"]
    for each in manifest.data:
        said = each.to_dict()
        share = f"{each.share:.1%}" if each.share is not None else "—"
        count = said.get("rows", f"{said['pictures']} pictures" if "pictures" in said else "—")
        license_ = _license_of_data(each.source)
        rows.append(f"| {_named(each.source)} | {share} | {count} | {said.get('tokens', '—')} | {license_} |")
    return "\n".join(rows)


def _figures(manifest: Manifest) -> str:
    metrics = manifest.metrics
    bounds = {f"{name}{end}" for name in metrics for end in ("_low", "_high")}
    changes = [c for c in before_and_after(metrics) if c.name not in bounds and (c.before != "—" or direction(c.name))]
    if not changes:
        return "## Figures\n\nNothing was measured."
    rows = ["## Figures", "", "On held-out rows.", "", "| | before | after | 95 % interval |", "|---|---|---|---|"]
    for change in changes:
        low, high = (metrics.get(f"{change.name}{end}") for end in ("_low", "_high"))
        between = f"{show(change.name, low)} to {show(change.name, high)}" if low is not None and high is not None else "—"
        between = f"change {change.between}" if change.between else between
        rows.append(f"| {change.name} | {change.before} | {change.after} | {between} |")
    if "forgetting/percent" in metrics:
        rows += ["", f"Forgetting: {metrics['forgetting/percent']:+.2f} % of the loss on general text."]
    return "\n".join(rows)


def _loading(run: Path, manifest: Manifest) -> str:
    head = "## Loading\n\n"
    if manifest.pipeline:
        return f"{head}    posttrain sample {run.name} --prompt '...'"
    if manifest.stage == "rm":
        return (
            f"{head}A reward model: it scores, and cannot write. posttrain takes it as `init_reward=`; plain code: docs/rlhf.md."
        )
    if manifest.weights.kind == "adapter" and not _is_of_peft(run / manifest.weights.path):
        return f"{head}A method that peft does not have:\n\n    posttrain chat {run.name}"
    code = _OF_MODEL if manifest.weights.kind == "model" else _OF_PEFT
    is_chat = bool(manifest.tokenizer and manifest.tokenizer.chat_template) and not (
        manifest.template and manifest.template.rows == "none"
    )
    note = ""
    if manifest.weights.kind == "adapter" and not hub_name(manifest.base):
        note = "The base is no model of the hub: put its place for `base_model_name_or_path`.\n\n"
    return f"{head}{note}```python\n{code}{_ANSWER if is_chat else _GOES_ON}```"


def _is_of_peft(weights: Path) -> bool:
    from peft import PeftType

    found = yaml.safe_load((weights / "adapter_config.json").read_text(encoding="utf-8"))
    return found.get("peft_type") in PeftType.__members__


def _reproduce(run: Path, manifest: Manifest) -> str:
    config = read_config(run)
    settings = yaml.safe_dump(_shown({key: config[key] for key in _SETTINGS if key in config}), sort_keys=False)
    return (
        f"## Again\n\n    posttrain reproduce {run.resolve().name}\n\n<details><summary>Settings</summary>\n\n"
        f"```yaml\n{settings}```\n\n</details>"
    )


def _shown(value: Any) -> Any:
    """Settings with absolute paths cut to names."""
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(each) for each in value]
    return _named(value) if isinstance(value, str) else value


def _named(text: str) -> str:
    """A path as its last part; anything else as it is."""
    return Path(text).name if text.startswith(("/", "~")) else text
