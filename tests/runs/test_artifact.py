"""Every kind of thing that a name can stand for, and what is known of it before anything is loaded."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import UserError
from posttrain.runs.artifact import WITHOUT_EFFECT, open_artifact
from posttrain.runs.files import sha256
from posttrain.runs.manifest import Base, Parent

BASE = {"name": "tiny", "path": "/models/tiny", "revision": None, "digest": "b" * 64}
LORA = {"peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"}


def files(directory: Path, **content: Any) -> Path:
    """name=content: text, or what becomes JSON; `_` in a name stands for a point."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, each in content.items():
        text = each if isinstance(each, str) else json.dumps(each)
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return directory


def adapter(directory: Path, **more: Any) -> Path:
    return files(directory, adapter_config__json={**LORA, **more}, adapter_model__safetensors="tensors")


def run(directory: Path, kind: str = "adapter", **said: Any) -> Path:
    weights = adapter(directory / kind) if kind == "adapter" else files(directory / kind, model__safetensors="tensors")
    manifest = {
        "stage": "sft",
        "base": BASE,
        "weights": {"kind": kind, "path": kind},
        "tokenizer": {"hash": "t", "chat_template": "c"},
        "dtype": "bfloat16",
        "quant": {"method": "nf4", "double_quant": True},
        "metrics": {},
        "config_digest": "d",
        "files": {str(p.relative_to(directory)): sha256(p) for p in sorted(weights.iterdir())} | {"held_out.json": "0"},
    }
    return files(directory, manifest__json=manifest | said)


def test_a_run_with_an_adapter(tmp_path: Path) -> None:
    found = open_artifact(run(tmp_path / "run"), "init")
    assert (found.kind, found.stage, found.is_run, found.is_pipeline) == ("adapter", "sft", True, False)
    assert found.base == Base(**BASE) and found.source == "/models/tiny"
    assert found.weights == tmp_path / "run" / "adapter" and found.tokenizer == str(found.weights)
    assert found.quantization == {"method": "nf4", "double_quant": True} and found.chat_template == "c"
    assert (found.adapter.peft_type, found.adapter.use_dora, found.adapter.rank) == ("LORA", False, 8)
    assert found.reward_head is None and found.finished().dtype == "bfloat16"
    assert found.digest == hashlib.sha256(b"tensors").hexdigest() and found.weight_bytes == 7
    assert list(found.weight_files) == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    record = Parent(role="init", path=str((tmp_path / "run").resolve()), digest=sha256(tmp_path / "run" / "manifest.json"))
    assert found.parents("init") == [record] and found.supported().verified() is found


def test_a_run_in_full(tmp_path: Path) -> None:
    found = open_artifact(str(run(tmp_path / "run", "model")), "init")
    weights = str(tmp_path / "run" / "model")
    assert found.kind == "model" and found.base == Base(name=weights, path=weights) and found.tokenizer == weights
    assert found.digest == "" and found.verified().is_run


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_reward_model_has_a_head(kind: str, tmp_path: Path) -> None:
    assert open_artifact(run(tmp_path / "run", kind, stage="rm"), "init").reward_head == tmp_path / "run" / kind


def test_a_dora_run_and_a_run_of_pictures(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", stage="dreambooth", pipeline="StableDiffusionPipeline")
    adapter(directory / "adapter", use_dora=True, r=4)
    found = open_artifact(directory, "run")
    assert found.adapter.use_dora and found.adapter.rank == 4 and found.is_pipeline and found.kind == "adapter"


def test_an_adapter_of_the_hub_that_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = adapter(tmp_path / "models--org--lora" / "snapshots" / "abc")
    files(tmp_path / "models--org--lora" / "refs", main="abc")
    found = open_artifact("org/lora", "init")
    assert (found.kind, found.weights, found.source) == ("adapter", snapshot, "org/base")
    assert open_artifact("org/other", "init").kind == "model"  # nothing is asked of the hub


def test_an_adapter_of_someone_elses_making(tmp_path: Path) -> None:
    directory = files(adapter(tmp_path / "lora"), chat_template__jinja="{{ x }}")
    found = open_artifact(directory, "init")
    assert (found.kind, found.is_run, found.stage, found.manifest) == ("adapter", False, None, None)
    assert found.base == Base(name="org/base", path="org/base") and found.tokenizer == "org/base"
    assert found.weights == directory and found.quantization == {"method": "none"} and found.parents("init") == []
    used = json.dumps({k: v for k, v in found.adapter.whole.items() if k not in WITHOUT_EFFECT and v is not None}, sort_keys=True)
    said = f"{hashlib.sha256(b'tensors').hexdigest()} {used}"
    assert found.digest == hashlib.sha256(said.encode()).hexdigest() and found.verified() is found
    assert found.chat_template == hashlib.sha256(b"{{ x }}").hexdigest()
    files(directory, tokenizer_config__json={})
    assert open_artifact(directory, "init").tokenizer == str(directory)
    assert found.supported() is found
    with pytest.raises(UserError, match=r"init: .* is no finished run"):
        found.finished()
    adapter(directory, task_type="SEQ_CLS")
    assert open_artifact(directory, "init").reward_head == directory
    with pytest.raises(UserError, match=r"init: .* is an adapter of a classifier, and no run of posttrain rm"):
        open_artifact(directory, "init").supported()
    adapter(directory, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"adapter_config.json does not say which base the adapter belongs to"):
        open_artifact(directory, "init").supported()
    with pytest.raises(UserError, match="nothing says where the base of the adapter"):
        open_artifact(directory, "init").source  # noqa: B018


def test_models_pipelines_and_names(tmp_path: Path) -> None:
    model = files(tmp_path / "model", config__json={"architectures": ["LlamaForCausalLM"]})
    scorer = files(tmp_path / "scorer", config__json={"architectures": ["LlamaForSequenceClassification"]})
    pipeline = files(tmp_path / "pipeline", model_index__json={"_class_name": "StableDiffusionPipeline"})
    for each in (model, scorer, pipeline):
        found = open_artifact(each, "run")
        assert (found.kind, found.is_run, found.weights, found.source, found.tokenizer) == (
            "model",
            False,
            each,
            *[str(each)] * 2,
        )
        assert found.is_pipeline == (each == pipeline) and found.reward_head == (scorer if each == scorer else None)
        assert found.supported().verified() is found and found.config is None
    for name in ("tiny", "org/name"):
        found = open_artifact(name, "init")
        assert (found.kind, found.directory, found.source, found.base) == ("model", None, name, Base(name=name, path=name))
        assert found.reward_head is None and found.verified() is found and found.parents("init") == []
        with pytest.raises(UserError, match="is no directory"):
            found.weights  # noqa: B018


def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "runs" / "first")
    (tmp_path / "runs" / "empty").mkdir()
    files(tmp_path / "stopped" / "checkpoints")
    files(tmp_path / "begun", config__yaml="stage: sft")
    files(tmp_path / "cut", manifest__json="{")
    files(tmp_path / "odd", adapter_config__json="[]")
    for name, words in (
        ("runs/empty", r"init: runs/empty is no finished run \(no manifest.json\)"),
        ("stopped", r"init: stopped is no finished run \(it has checkpoints: finish it with its own command first\)"),
        ("begun", "init: begun is no finished run; finish it with its own command first"),
        ("./nothing", "init: nothing does not exist"),
        (str(tmp_path / "runs" / "frist"), "frist does not exist - did you mean 'first'?"),
        ("runs/sft/a", "init: runs/sft/a does not exist"),
        ("cut", "cut/manifest.json cannot be read"),
        ("odd", "init: odd/adapter_config.json cannot be read"),
    ):
        with pytest.raises(UserError, match=words) as found:
            open_artifact(name, "init")
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "adapter" / "adapter_model.safetensors").write_text("other"), "adapter_model.safetensors is damaged"),
        (lambda d: (d / "adapter" / "adapter_config.json").unlink(), "adapter_config.json is missing, though"),
        (lambda d: (d / "adapter" / "old.bin").write_bytes(pickle.dumps(1)), "old.bin may be a pickle"),
    ],
)
def test_a_run_that_is_not_as_its_manifest_says(damage: Any, words: str, tmp_path: Path) -> None:
    directory = run(tmp_path / "run")
    damage(directory)
    found = open_artifact(directory, "init_reward")
    with pytest.raises(UserError, match=rf"init_reward: .*{words}"):
        found.verified()


def test_a_bare_adapter_is_verified_as_far_as_it_goes(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "lora")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match=r"run: .*adapter_model.bin may be a pickle"):
        open_artifact(directory, "run").verified()
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
        open_artifact(directory, "run").verified()


def test_a_manifest_that_lists_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lists no safetensors file"):
        open_artifact(run(tmp_path / "run", files={}), "run").verified()
    with pytest.raises(UserError, match="nothing says where the base"):
        open_artifact(run(tmp_path / "other", base={"name": "tiny"}), "run").source  # noqa: B018
