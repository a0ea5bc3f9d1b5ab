"""A model's files of others: whatever is wrong with one is a line that names it, in our words, before a step."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import posttrain
from posttrain.data.chat import template_text
from posttrain.errors import RunError, UserError, first_line, is_out_of_memory, reading
from posttrain.models.builtin import builtin_directory
from posttrain.models.checkpoints import files

WORDS = ("train.max_steps=1", "data.max_rows=8", "eval.rows=1", "data.eval_rows=1", "train.batch_size=1")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shutil.copytree(builtin_directory("tiny")[0], tmp_path / "base")
    return tmp_path / "base"


def setting(key: str, value: Any) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        file = base / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


def header(size: int, text: bytes) -> Callable[[Path], object]:
    return lambda base: (base / "model.safetensors").write_bytes(struct.pack("<Q", size) + text)


def rewritten(name: str, change: Callable[[Any], None]) -> Callable[[Path], object]:
    def damage(base: Path) -> None:
        content = json.loads((base / name).read_text())
        change(content)
        (base / name).write_text(json.dumps(content))

    return damage


def lose_a_word(tokenizer: Any) -> None:
    """A merge whose result is no word of the vocabulary."""
    del tokenizer["model"]["vocab"]["".join(tokenizer["model"]["merges"][-1])]


LIES = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}).encode()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (header(2**62, b"{}"), "model.safetensors cannot be read (Error while deserializing header: header too large)"),
        (header(len(LIES), LIES + bytes(4)), "model.safetensors cannot be read (Error while deserializing header: overflow"),
        (header(0, b""), "model.safetensors cannot be read ("),
        (lambda base: (base / "config.json").write_text("[]"), "base cannot be read ("),
        (setting("architectures", 3), "base cannot be read ("),
        (setting("hidden_size", "x"), "base cannot be read (Validation error for field 'hidden_size': TypeError"),
        (setting("num_attention_heads", 0), "ZeroDivisionError"),
        (setting("hidden_act", "nope"), "cannot be loaded as a causal language model (KeyError: 'nope')"),
        (setting("dtype", "nope"), "'nope'"),
        (lambda base: (base / "tokenizer_config.json").write_text("[]"), "no tokenizer can be loaded from"),
        (lambda base: (base / "tokenizer.json").write_text("{}"), "no tokenizer can be loaded from"),
        (rewritten("tokenizer.json", lose_a_word), "no tokenizer can be loaded from"),
        (rewritten("tokenizer_config.json", lambda found: found.update(model_max_length=[])), "the tokenizer of"),
        (lambda base: (base / "generation_config.json").write_text("{"), "generation_config.json cannot be read ("),
        (lambda base: (base / "generation_config.json").write_text('{"eos_token_id": "x"}'), "generation_config.json cannot be"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(damage: Callable[[Path], object], said: str, base: Path, tmp_path: Path) -> None:
    damage(base)
    with pytest.raises(UserError) as caught:
        posttrain.run("sft", f"model.name={base}", *WORDS, f"run.dir={tmp_path / 'run'}")
    line = str(caught.value)
    assert line.startswith("model.name: ") and said in line and "\n" not in line and "; give " in line


def test_more_tensors_than_any_model_has(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small header can list millions, each of which libraries look at."""
    monkeypatch.setattr(files, "MOST", 10)
    with pytest.raises(UserError, match=r"^model.name: .*base lists 20 tensors, more than any model has; give another"):
        posttrain.run("sft", f"model.name={base}", *WORDS, f"run.dir={tmp_path / 'run'}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_told_so(value: float, base: Path, tmp_path: Path) -> None:
    """By the tensor; not as documents that would see one another."""
    file, name = base / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^model.name: .*{name} holds values that are not finite \(NaN, infinity\); give"):
        posttrain.run("sft", f"model.name={base}", *WORDS, f"run.dir={tmp_path / 'run'}")


def test_memory_is_told_from_other_failures() -> None:
    said = (
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("unable to mmap 513 bytes from file </x>: Cannot allocate memory (12)"),
        OSError(12, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        torch.OutOfMemoryError("x"),
    )
    assert all(is_out_of_memory(error) for error in said)
    assert not any(
        is_out_of_memory(error) for error in (ValueError("x"), OSError(28, "No space left on device"), KeyError("memory"))
    )
    assert not is_out_of_memory(UserError("not enough memory: say so"))
    outer = ValueError("cannot load")
    outer.__cause__ = MemoryError()
    assert is_out_of_memory(outer)


def test_what_a_library_says_becomes_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(UserError, match=r"^x: y cannot be read \(KeyError: 'z'\); give another$"),
        reading("x: y cannot be read", "give another"),
    ):
        raise KeyError("z")
    for passes in (MemoryError(), UserError("mine"), NotImplementedError("later")):
        with pytest.raises(type(passes)), reading("x", "y", (NotImplementedError,)):
            raise passes
    monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    with pytest.raises(KeyError), reading("x", "y"):
        raise KeyError("z")
    assert [first_line(e) for e in (ValueError("a.\nb"), ValueError("a:\n  b."), AttributeError("c"), IndexError())] == [
        "a", "a: b", "AttributeError: c", "IndexError",
    ]  # fmt: skip


def test_out_of_memory_while_a_way_of_reading_is_tried(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from posttrain.models.language.packed_lm import PackedLM

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(PackedLM, "hidden", full)
    with pytest.raises(RunError, match=r"^out of memory; try "):
        posttrain.run("sft", f"model.name={base}", *WORDS, f"run.dir={tmp_path / 'run'}")


def test_a_run_that_diverges_is_told_to_learn_slower(tmp_path: Path) -> None:
    """No batch is to blame, so none is to be left out."""
    words = ("model=tiny", *WORDS, "train.max_steps=3", "optim.lr=1e10", f"run.dir={tmp_path / 'run'}")
    with pytest.raises(RunError) as caught:
        posttrain.run("sft", *words)
    line = str(caught.value)
    assert "training has diverged (" in line and "take an optim.lr below 1e+10" in line and "skip_nonfinite" not in line


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(UserError, match=r"^model.chat_template: .*t.jinja cannot be read \(.*utf-8.*\); give a text in UTF-8$"):
        template_text.chat_template(str(tmp_path / "t.jinja"))
