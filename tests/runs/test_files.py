"""What is copied into a result, and who may read what is written."""

import ast
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import posttrain
from posttrain.models.diffusion.denoiser import save_pipeline
from posttrain.models.peft import merge
from posttrain.models.peft.merge import copy_tokenizer
from posttrain.runs import files
from posttrain.runs.files import by_umask, copy_own, file_hashes, replacing, scratch_beside, stays_inside, temporary_beside


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret.json").write_text('"of another"')
    return tmp_path / "secret.json"


def test_links_that_lead_out_are_left_out(secret: Path, tmp_path: Path) -> None:
    """A link within the directory, and one to a blob of the hub's cache, are files like others."""
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    (run / "own.json").write_text("1")
    (run / "inside.json").symlink_to(run / "own.json")
    (run / "outside.json").symlink_to(secret)
    (run / "gone.json").symlink_to(tmp_path / "nowhere")
    assert copy_own(run.iterdir(), run, out) == ["gone.json", "outside.json"]
    assert sorted(p.name for p in out.iterdir()) == ["inside.json", "own.json"] and not (out / "inside.json").is_symlink()
    assert copy_own(run.iterdir(), run, out, ["own.json", "outside.json"]) == ["gone.json", "inside.json", "outside.json"]
    assert sorted(file_hashes(run)) == ["inside.json", "own.json"]
    snapshot, blobs = tmp_path / "models--o--m" / "snapshots" / "a1", tmp_path / "models--o--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "b").write_text("2")
    (snapshot / "config.json").symlink_to("../../blobs/b")
    (snapshot / "evil.json").symlink_to(secret)
    assert stays_inside(snapshot / "config.json", snapshot) and not stays_inside(snapshot / "evil.json", snapshot)


def test_a_merge_takes_the_tokenizer_files_that_the_manifest_lists(
    secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = tmp_path / "run" / "adapter", tmp_path / "out"
    adapter.mkdir(parents=True)
    out.mkdir()
    for name in ("tokenizer.json", "unlisted.json", "adapter_config.json"):
        (adapter / name).write_text("{}")
    (adapter / "special_tokens_map.json").symlink_to(secret)
    listed = dict.fromkeys(("adapter/tokenizer.json", "adapter/special_tokens_map.json"), "0")
    monkeypatch.setattr(merge, "is_finished", lambda run: run == tmp_path / "run")
    monkeypatch.setattr(merge, "read_manifest", lambda run: SimpleNamespace(files=listed))
    copy_tokenizer(adapter, out)
    assert [p.name for p in out.iterdir()] == ["tokenizer.json"]
    assert "special_tokens_map.json, unlisted.json left out" in capsys.readouterr().out.replace("\n", " ")


def test_a_saved_pipeline_follows_no_link_out_of_its_base(secret: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "scheduler").mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    (base / "scheduler" / "x.json").symlink_to(secret)
    (base / "home").symlink_to(tmp_path)
    save_pipeline(base, {}, tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")) == [
        "model_index.json",
        "scheduler",
    ]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_the_umasks(umask: int, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors makes files that nobody else can read; what somebody has set otherwise stays."""
    monkeypatch.setattr(files, "_UMASK", umask)
    (tmp_path / "deep").mkdir()
    weights, other = tmp_path / "deep" / "w.safetensors", tmp_path / "other"
    save_file({"a": torch.zeros(1)}, weights)
    other.write_text("x")
    other.chmod(0o640)
    by_umask(tmp_path)
    with replacing(tmp_path / "new.json") as new:
        new.touch(0o600)
        new.write_text(json.dumps(1))
    assert [p.stat().st_mode & 0o777 for p in (weights, tmp_path / "new.json", other)] == [mode, mode, 0o640]


def test_left_overs_of_processes_that_are_gone_are_swept(tmp_path: Path) -> None:
    """Files and directories; not those of a process that is at work, of another machine, or of other names."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine = temporary_beside(tmp_path / "config.yaml")
    theirs = mine.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-")
    elsewhere = theirs.replace(files.HOST, "another")
    for name in (mine.name, theirs, elsewhere, "config.yaml", ".x.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / theirs.replace("config.yaml", "out")).mkdir()
    (tmp_path / theirs.replace("config.yaml", "out") / "weights").write_text("x")
    with scratch_beside(tmp_path / "out") as scratch:
        assert scratch.parent == tmp_path and scratch.is_dir()
        found = {p.name for p in tmp_path.iterdir()} - {scratch.name}
    assert found == {mine.name, elsewhere, "config.yaml", ".x.tmp"} and not scratch.exists()


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    """Whatever the locale says: under LC_ALL=C an ä was a damaged file."""
    wrong, seen = list[str](), 0
    for path in Path(posttrain.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or _name(node.func) not in ("read_text", "write_text", "open", "fdopen"):
                continue
            words = [*(a.value for a in node.args if isinstance(a, ast.Constant)), *(k.arg for k in node.keywords)]
            is_ours = isinstance(node.func, ast.Name) and node.func.id == "write_text"
            modes = [a for a in words if isinstance(a, str) and a and set(a) <= set("rwabxt+")]
            opens_text = _name(node.func) in ("read_text", "write_text") or any("b" not in mode for mode in modes)
            if opens_text and not is_ours:
                seen += 1
                wrong += [] if {"encoding", "utf-8"} & set(words) else [f"{path.name}:{node.lineno}"]
    assert not wrong and seen > 40


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))
