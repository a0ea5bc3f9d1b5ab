"""The manifest: what is read is what was written, other versions' words are kept, and what is wrong is said in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.errors import UserError
from posttrain.runs.directory import Run
from posttrain.runs.manifest import SCHEMA, Base, Manifest, Parent, read_manifest

HERE = Path(__file__).parents[1] / "runs_of_version_0_1"
LEAST = {
    "stage": "sft",
    "weights": {"kind": "adapter", "path": "adapter"},
    "files": {"adapter/x": "ab"},
    "metrics": {},
    "config_digest": "c",
}
PICTURES = {
    **LEAST,
    "schema": 1,
    "stage": "dreambooth",
    "pipeline": "StableDiffusionPipeline",
    "token": "sks",
    "prompts": {"instance": "a sks dog", "class": "a dog"},
    "size": 32,
    "trained_parts": ["unet"],
    "left_out": ["photos/4.png: cut short"],
    "images": 12,
    "data": [{"source": "photos", "pictures": 4, "views": 4, "share": 1.0, "fingerprint": "ff"}],
}
POLICY = {
    **LEAST,
    "schema": 1,
    "stage": "ppo",
    "parents": [{"role": "init", "path": "/runs/sft", "digest": "d"}, {"role": "reward", "path": "/runs/rm", "digest": "e"}],
    "alarms": [{"step": 3, "text": "every answer got the same reward"}],
    "kl_coef": 0.05,
    "ended": {"step": 9, "back_to": 6},
    "changes": [{"step": 2, "change": "optim.lr was 0.1, is now 0.2"}],
    "batches_left_out": [{"step": 4, "why": "loss", "rows": ["a.jsonl, row 3"]}],
    "halved": [5],
    "peft": {"method": "adalora", "r": 4, "ranks": {"layers.0.q": 3}},
    "tokens": 100,
}
COMPOSED = {
    **PICTURES,
    "stage": "compose",
    "token": ["sks", None],
    "seed": None,
    "sum": [{"run": "/a", "weight": 0.5}],
    "digest": "f",
}


def written(tmp_path: Path, content: Any) -> Path:
    (tmp_path / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("name", "total"), [("sft", 36304), ("dpo", 36768)])  # with the frozen adapter beneath
def test_a_manifest_of_version_0_1_comes_out_as_it_went_in(name: str, total: int) -> None:
    raw = json.loads((HERE / name / "manifest.json").read_text(encoding="utf-8"))
    found = read_manifest(HERE / name)
    assert found.to_dict() == raw
    assert (found.schema_version, found.stage, found.weights.kind, found.quant.method, found.peft.method) == (
        1, name, "adapter", "none", "lora",
    )  # fmt: skip
    assert found.base.path == "@HERE@/base" and found.tokenizer and len(found.tokenizer.hash) == 64
    assert found.trainable and (found.trainable.trained, found.trainable.total) == (464, total)
    assert found.amount == (raw["tokens"], "tokens") and found.metrics == raw["metrics"]
    assert [parent.role for parent in found.parents] == (["init"] if name == "dpo" else [])


@pytest.mark.parametrize("raw", [LEAST, PICTURES, POLICY, COMPOSED], ids=["least", "pictures", "policy", "composed"])
def test_every_field_makes_the_round_trip(raw: dict[str, Any], tmp_path: Path) -> None:
    found = read_manifest(written(tmp_path, raw))
    assert json.loads(json.dumps(found.to_dict())) == raw
    assert found.model_extra == {}, "a field of ours is not declared"


def test_typed_parts() -> None:
    pictures, policy, composed = (Manifest.model_validate(raw) for raw in (PICTURES, POLICY, COMPOSED))
    assert pictures.amount == (12, "images") and pictures.trained_parts == ("unet",) and policy.amount == (100, "tokens")
    assert policy.parents[1] == Parent(role="reward", path="/runs/rm", digest="e")
    assert policy.ended and policy.ended.back_to == 6 and policy.alarms[0].step == 3 and policy.peft.ranks == {"layers.0.q": 3}
    assert composed.token == ("sks", None) and composed.seed is None
    assert pictures.to_dict("size", "token", "seed") == {"size": 32, "token": "sks"}
    least = Manifest.model_validate(LEAST)
    assert least.quant.method == "none" and least.base == Base(name="") and least.parents == ()


def test_what_another_version_says_is_kept(tmp_path: Path) -> None:
    raw = {
        **LEAST,
        "kernels": {"fused": True},
        "weights": {**LEAST["weights"], "bits": 16},
        "quant": {"method": "nf4", "new": [1]},
    }  # type: ignore[dict-item]
    found = read_manifest(written(tmp_path, raw))
    assert found.to_dict() == raw and found.model_extra == {"kernels": {"fused": True}}


def test_a_manifest_of_a_later_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"manifest.json is of a later version of posttrain \(schema {SCHEMA + 1}\); update"):
        read_manifest(written(tmp_path, {**LEAST, "schema": SCHEMA + 1}))


def test_it_is_frozen() -> None:
    found = Manifest.model_validate(LEAST)
    for change in (lambda: setattr(found, "stage", "dpo"), lambda: setattr(found.weights, "path", "..")):
        with pytest.raises(ValidationError, match="frozen"):
            change()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"kind": "adapter", "path": "../elsewhere"}}, "weights.kind or weights.path"),
        ({"weights": {"kind": "folder", "path": "adapter"}}, "weights.kind or weights.path"),
        ({"weights": {"path": "adapter"}}, "weights.kind or weights.path"),
        ({"weights": "adapter"}, "weights is str, not dict"),
        ({"files": {"/etc/passwd": "0"}}, "files has '/etc/passwd'"),
        ({"files": {"adapter/x": 5}}, "files has 'adapter/x'"),
        ({"files": []}, "files is list, not dict"),
        ({"metrics": {"eval/loss": "low"}}, "metrics.eval/loss is no number"),
        ({"metrics": {"eval/loss": True}}, "metrics.eval/loss is no number"),
        ({"parents": {}}, "parents is dict, not list"),
        ({"parents": [{"role": "init", "path": "/a"}]}, "parents.0.digest is missing"),
        ({"stage": 5}, "stage is int, not str"),
        ({"steps": "many"}, "steps: input should be a valid integer"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as found:
        read_manifest(written(tmp_path, {**LEAST, **change}))
    assert f"manifest.json is no manifest of a run: {words}" in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "it is no object"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps({k: v for k, v in LEAST.items() if k != "config_digest"}), "config_digest is missing"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_at_all(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_manifest(written(tmp_path, content))
    with pytest.raises(UserError, match=r"is no finished run \(no manifest.json\)"):
        read_manifest(tmp_path / "nowhere")


def test_a_run_writes_what_its_manifest_says(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "x").write_text("weights")
    parent = Parent(role="init", path="/runs/sft", digest="d")
    said = {"stage": "sft", "weights": LEAST["weights"], "metrics": {"eval/r": math.nan, "eval/count": 8}, "parents": [parent]}
    manifest = Run(tmp_path, {"stage": "sft"}).finish(said)
    raw = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert list(raw) == ["schema", "stage", "parents", "weights", "metrics", "config_digest", "code", "versions", "files"]
    assert math.isnan(raw["metrics"]["eval/r"]) and raw["metrics"]["eval/count"] == 8
    assert raw["parents"] == [{"role": "init", "path": "/runs/sft", "digest": "d"}]
    assert list(raw["files"]) == ["adapter/x"] and read_manifest(tmp_path).files == manifest.files
