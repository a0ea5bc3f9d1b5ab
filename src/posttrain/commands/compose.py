"""`posttrain compose`: several finished adapters as one, whose change is their weighted sum.

Sums of LoRA are exact: ranks add up (LoraHub, Huang et al. 2023, arXiv 2307.13269; task arithmetic, Ilharco et al. 2023,
arXiv 2212.04089). The result is a finished run's directory, so that every other command knows what to do with it.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from posttrain.commands.merge import refuse_scorer, require_empty
from posttrain.commands.sample import compose_pipelines
from posttrain.config.compose import compose
from posttrain.config.schema.data import data_defaults
from posttrain.console import Meter, say
from posttrain.data.chat.encoder import template_hash
from posttrain.data.collate import pack
from posttrain.data.prepare import prepare_set
from posttrain.errors import UserError
from posttrain.losses.tokens import token_loss
from posttrain.models.hub import digest as digest_of
from posttrain.models.hub import resolve
from posttrain.models.language.loading import LOADED_AS, base_digest, load_base
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.run_data import data_of, differences, encoder_of, of_file
from posttrain.models.language.tokenizer import load_tokenizer, write_ends
from posttrain.models.peft.attach import load_adapter, put_beside
from posttrain.models.peft.export import write_lora
from posttrain.models.peft.factors import Factors, joined
from posttrain.models.peft.kinds import ROWS as OWN_ROWS
from posttrain.models.peft.kinds import is_plain_sum
from posttrain.models.peft.merge import Adapter, copy_tokenizer
from posttrain.reports.card import write_card
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.directory import CONFIG, Run, read_config
from posttrain.runs.earlier import same_base
from posttrain.runs.files import scratch_beside, write_json, write_text
from posttrain.runs.identity import digest
from posttrain.runs.manifest import Base
from posttrain.runs.remote import here
from posttrain.training.loss_scale import gradients_by

STEPS, RATE, ROWS, LENGTH = 40, 0.05, 64, 512  # of learning the weights


@dataclass(frozen=True)
class Part:
    """One adapter of a sum."""

    run: Path
    artifact: Artifact
    adapter: Adapter


def compose_runs(words: list[str], out: Path, weights: list[float] | None, learn: Path | None) -> dict[str, Any]:
    """Write the sum of adapters to `out`; returns its manifest.

    words: run directories, or one expression such as "A + B - C" or "0.5*A + B" with spaces around + and -. weights: one a
    run; None: all 1, or those of the expression. learn: a file on which they are learned. Raises UserError, with nothing
    written, for adapters of different bases, adapters that are no sums, and weights that do not fit.
    """
    runs, factors = parse_sum(words, weights)
    runs = [Path(here(run, "compose")) for run in runs]
    if learn and (weights or factors != [1.0] * len(runs)):
        raise UserError("--learn: the weights are to be learned, so give none")
    require_empty(out)
    artifacts = [open_artifact(run, "compose") for run in runs]
    if any(each.is_pipeline for each in artifacts):
        if learn:
            raise UserError("--learn: weights of diffusion models' adapters are not learned; give --weights")
        return compose_pipelines(runs, factors, out)
    terms = [(_read(run, artifact), factor) for run, artifact, factor in zip(runs, artifacts, factors, strict=True)]
    terms.sort(key=lambda term: not term[0].artifact.is_run)  # the sum has tokenizer and config of the first
    parts, factors = [part for part, _ in terms], [factor for _, factor in terms]
    _require_one_base(parts)
    if learn:
        factors = learn_weights(parts, learn)
    say("  ".join(f"{factor:+.4g} × {part.run.name}" for factor, part in zip(factors, parts, strict=True)))
    return _write(parts, factors, out, learn)


def parse_sum(words: list[str], weights: list[float] | None) -> tuple[list[Path], list[float]]:
    """Run directories and their weights."""
    if len(words) == 1 and not Path(words[0]).expanduser().is_dir() and re.search(r"\s[+-]\s|\*", words[0]):
        if weights:
            raise UserError("--weights: the expression has its own; leave them out")
        return _parse_expression(words[0])
    if weights is not None and len(weights) != len(words):
        raise UserError(f"--weights: {len(weights)} weights for {len(words)} runs; give one a run")
    return [Path(word).expanduser() for word in words], weights or [1.0] * len(words)


def _parse_expression(text: str) -> tuple[list[Path], list[float]]:
    runs, factors = [], []
    terms = re.split(r"\s+([+-])\s+", " + " + text.strip() if not text.strip().startswith("- ") else " " + text.strip())
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        found = re.fullmatch(r"(?:([0-9.]+(?:e-?\d+)?)\s*\*\s*)?(\S.*)", term.strip())
        if not found:
            raise UserError(f"'{term}' is no term of a sum; write A + B - C or 0.5*A + B, with spaces around + and -")
        factors.append((-1.0 if sign == "-" else 1.0) * float(found[1] or 1))
        runs.append(Path(found[2]).expanduser())
    return runs, factors


def _read(run: Path, artifact: Artifact) -> Part:
    artifact.supported()
    if artifact.kind == "model":
        resolve(artifact.source, None, weights=False, field="run")  # or nothing at all
        raise UserError(f"{run} is a whole model; only adapters can be composed")
    refuse_scorer(artifact)
    adapter = Adapter(artifact.verified().weights, "compose")
    if not is_plain_sum(adapter.config):
        raise UserError(f"{run}: the change of {adapter.kind.name} is no sum of matrices that others could be added to; merge it")
    if adapter.config.get(OWN_ROWS):
        raise UserError(f"{run}: it has tokens of its own, whose rows cannot be added to others; merge it")
    return Part(run, artifact, adapter)


def _require_one_base(parts: list[Part]) -> None:
    first, base = parts[0], parts[0].artifact.base
    for part in parts[1:]:
        if not same_base(base_digest(part.artifact), base_digest(first.artifact)):
            raise UserError(
                f"{part.run} belongs to another base ({part.artifact.base.name}) than {first.run} ({base.name}): their changes "
                "cannot be added"
            )


def weighted_sum(adapters: list[Adapter], weights: list[float]) -> dict[str, Factors]:
    """Factors of sum_i weight_i B_i A_i for every layer that one of them changes."""
    found: dict[str, list[Factors]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module in adapter.modules:
            factors = adapter.factors(module)
            _check_like(found.get(module, []), factors, f"{adapter.where.partition(': ')[2]} at {module}")
            found.setdefault(module, []).append(factors.times(weight))
    return {module: joined(parts) for module, parts in found.items()}


def _check_like(others: list[Factors], factors: Factors, where: str) -> None:
    """Raises UserError where a change cannot be added to others of its layer."""
    for other in others[:1]:
        there, here = ((each.b.shape[0], each.a.shape[-1]) for each in (factors, other))
        if there != here:
            raise UserError(f"the change of {where} has another shape ({there[0]}x{there[1]}, not {here[0]}x{here[1]})")


def learn_weights(parts: list[Part], path: Path) -> list[float]:
    """Weights that are best on the rows of `path`: Adam on their token loss from 1/n each, all else frozen."""
    first = parts[0].artifact
    dtype, kernels = (first.manifest.dtype, first.manifest.kernels.choice) if first.manifest else (LOADED_AS, "auto")
    tokenizer = load_tokenizer(first.tokenizer, None, None, None)
    data = data_of(first, {})
    found = prepare_set(of_file(data, str(path), ROWS), ROWS, encoder_of(first, tokenizer, data), LENGTH)
    if found.kind == "pairs":
        raise UserError(f"--learn: {path} holds pairs; give conversations, completions or text")
    examples = found.examples
    model: Any = load_adapter(load_base(first, "cpu", dtype, True), first.weights)
    names = ["default", *(f"part{i}" for i in range(1, len(parts)))]
    for name, part in zip(names[1:], parts[1:], strict=True):
        put_beside(model, part.artifact.weights, name)
    model.base_model.set_adapter(names)
    model.requires_grad_(False)
    lm = PackedLM(model, kernels=kernels).eval()
    scales = torch.full((len(parts),), 1 / len(parts), requires_grad=True)
    optimizer = torch.optim.Adam([scales], lr=RATE)
    _scale(model, names, scales)
    batches = [pack(examples, range(i, min(i + 4, len(examples)))) for i in range(0, len(examples), 4)]
    losses, gradients = list[float](), gradients_by(dtype)
    with Meter("weights", STEPS) as meter:
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            loss = token_loss(lm(batch), batch.weight).total / batch.loss_denominator
            (scales.grad,) = gradients(loss, [scales])
            optimizer.step()
            losses.append(float(loss.detach()))
            meter.advance(f"loss {losses[-1]:.4f}")
    if not all(map(math.isfinite, losses)):
        raise UserError(f"--learn: the loss on {path} is not finite")
    return [round(float(value), 6) for value in scales.detach()]


class _Scaled(nn.Module):
    """A weight times one of the scales that are learned."""

    def __init__(self, scales: Tensor, index: int) -> None:
        super().__init__()
        self.scale = [scales, index]  # in a list: no parameter of the model's

    def forward(self, weight: Tensor) -> Tensor:
        """B as it is read: by a linear layer, or for all experts at once."""
        scales, index = self.scale
        return weight * scales[index].to(weight.dtype)


def _scale(model: Any, names: list[str], scales: Tensor) -> None:
    """Every adapter's B times its scale: gradients reach the scales alone."""
    for module in list(model.modules()):
        for index, name in enumerate(names):
            if name in getattr(module, "lora_B", {}):
                register_parametrization(module.lora_B[name], "weight", _Scaled(scales, index))


def _write(parts: list[Part], weights: list[float], out: Path, learn: Path | None) -> dict[str, Any]:
    first = parts[0]
    base = first.artifact.base
    for part in parts[1:]:
        if found := differences(first.artifact, part.artifact, {}):
            say(f"{', '.join(found)} of {part.run} was another than that of {first.run}, as which the sum is spoken with")
    with torch.device("meta"):
        skeleton = _skeleton(base)
    for part in parts:
        part.adapter.name_by(skeleton)
    transposed = bool(first.adapter.config.get("fan_in_fan_out"))
    with scratch_beside(out) as scratch:
        made = scratch / "run"
        made.mkdir()
        write_lora(weighted_sum([p.adapter for p in parts], weights), 1.0, made / "adapter", base.path, skeleton, transposed)
        config, record = _as_run(first, made / "adapter")
        write_text(made / CONFIG, yaml.safe_dump(config, sort_keys=False))
        sums = [{"run": str(p.run.resolve()), "weight": w} for p, w in zip(parts, weights, strict=True)]
        write_json(made / "compose.json", {"sum": sums, "learned_on": str(learn) if learn else None})
        record |= {"stage": "compose", "parents": [p for part in parts for p in part.artifact.parents("init")], "sum": sums}
        record |= {"peft": {"method": "lora"}, "metrics": {}, "data": [], "steps": 0, "tokens": 0, "seconds": 0.0, "seed": None}
        manifest = Run(made, {**config, "sum": sums}).finish({**record, "digest": digest({"sum": sums})})
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    write_card(out)
    say(f"composed adapter {out / 'adapter'}")
    return manifest.to_dict()


def _as_run(part: Part, adapter: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and manifest of the run that the adapter is from, whose tokenizer goes into the directory `adapter`; of one that is
    from no run what a run would say of it."""
    artifact = part.artifact
    if artifact.is_run:
        copy_tokenizer(artifact.weights, adapter)
        return read_config(part.run), artifact.finished().to_dict("base", "weights", "tokenizer", "dtype", "quant", "template")
    base, tokenizer = resolve(artifact.source, None), load_tokenizer(artifact.tokenizer, None, None, None)
    encoder = encoder_of(artifact, tokenizer, data_of(artifact, {}))
    tokenizer.save_pretrained(adapter)
    write_ends(adapter, encoder.end_tokens(), base.directory)
    config = compose("sft", ["peft=lora", f"model.name={artifact.source}"]) | {"data": data_defaults()}
    return config, {
        "base": {"name": artifact.base.name, "path": base.path, "revision": base.revision, "digest": digest_of(base.directory)},
        "weights": {"kind": "adapter", "path": "adapter"},
        "tokenizer": {"hash": encoder.identity, "chat_template": template_hash(tokenizer)},
        "dtype": LOADED_AS,
        "quant": artifact.quantization,
    }


def _skeleton(base: Base) -> Any:
    """The base without weights, for the names of its layers."""
    from posttrain.models.language.architecture import config_of, model_class

    config = config_of(resolve(base.path, base.revision).directory, None)
    return model_class(config).from_config(config)
