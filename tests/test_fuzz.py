"""Every file that the tool reads, damaged at random: what follows is right, or one line that names it; never a traceback, or a
hang. More by hand: FUZZ_TIMES=140 FUZZ_SEED=1 pytest tests/test_fuzz.py"""

import gzip
import json
import lzma
import os
import random
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.commands.cache import list_cache
from posttrain.commands.evaluate import evaluate_runs
from posttrain.config.compose import compose_run, inherit_model, validate
from posttrain.config.paths import root
from posttrain.data.chat.encoder import Encoder
from posttrain.data.example_store import Store, load
from posttrain.data.examples import build
from posttrain.data.overlaps import rows_of
from posttrain.data.sources.source import read_rows
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch.recipe import load_recipe
from posttrain.models.builtin import CHATML, builtin_directory
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.reports.compare_page import compare_page
from posttrain.reports.run_page import run_page
from posttrain.reports.run_records import read_record
from posttrain.runs.cache import cached_directory, cached_json, cached_tensors
from posttrain.runs.directory import open_run
from posttrain.runs.manifest import read_manifest
from posttrain.stages.language.init import resolve_start
from posttrain.stages.language.prepare import prepare_language
from posttrain.stages.steps import Context
from posttrain.training.checkpoint import newest_checkpoint

SEED, TIMES = int(os.environ.get("FUZZ_SEED", "20261124")), int(os.environ.get("FUZZ_TIMES", "30"))
LONG = 60  # seconds that an input may take on a busy machine
TINY = ["model=tiny", "+peft=lora", "peft.r=4", "train.max_steps=2", "data.max_rows=30", "eval.rows=1", "data.eval_rows=2"]
GARBAGE = (b"", b"\x00", b"\xff\xfe", b"null", b"[]", b"{}", b'"text"', b"-1", b"[" * 5000, b"{" * 5000,
           b"!!python/object:os.system {}",
           b"&a [*a, *a]", b"\x80\x04\x95", b"\xef\xbb\xbf{}", b"NaN", b"{\"a\": 1e999}")  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten, doubled, emptied or replaced."""
    way, at = rng.randrange(7), rng.randrange(len(content) + 1)
    if way == 0:
        return content[:at]
    if way == 1:
        found = bytearray(content)
        for _ in range(rng.choice((1, 1, 8, 64))):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        return bytes(found)
    if way == 2:
        return content[:at] + rng.randbytes(rng.randrange(1, 64)) + content[at:]
    if way == 3:
        return content[: at // 2] + content[at:]
    if way == 4:
        return content + content[at:]
    if way == 5:  # another value of another kind, still well formed
        tokens = [b"1", b"null", b"[]", b"{}", b'"x"', b"true", b"-0.5", b"1e400"]
        spots = [i for i in range(len(content)) if content[i : i + 1] in (b":", b",")]
        spot = rng.choice(spots or [0])
        end = next((i for i in range(spot + 1, len(content)) if content[i : i + 1] in (b",", b"}", b"]", b"\n")), len(content))
        return content[: spot + 1] + b" " + rng.choice(tokens) + content[end:]
    return rng.choice(GARBAGE)


@dataclass(frozen=True)
class Case:
    """file: what is damaged, below the directory of all runs. read: everything that reads it. again: it is in the cache, so that
    it is never refused, and what is read is what was written."""

    file: str
    read: Callable[[Path], object]
    again: bool = False


class Hangs(BaseException):
    """An input took longer than LONG."""


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    return compose_run("sft", [*TINY, *words])


def resume(home: Path) -> object:
    return open_run({**composed(()), "run": composed(())["run"] | {"dir": str(home / "stopped")}}).close()


def checkpoints(home: Path) -> object:
    return newest_checkpoint(home / "stopped" / "checkpoints")


def start_from(home: Path) -> object:
    config = inherit_model({**composed(()), "init": str(home / "run")}, TINY)
    return resolve_start(validate(config))


def pages(home: Path) -> object:
    return read_record(home / "run"), run_page(home / "run"), compare_page([home / "run", home / "run"], home / "both.html")


def rows(name: str) -> Callable[[Path], object]:
    return lambda home: list(read_rows(str(home / name)))


def prepared(name: str) -> Callable[[Path], object]:
    """All the way to tokens."""

    def read(home: Path) -> object:
        config = composed(("eval.sets=null", "data.eval_share=0"))
        cfg = validate({**config, "data": config["data"] | {"path": str(home / name), "max_rows": None}})
        return prepare_language(Context(cfg, home, 1, True, torch.device("cpu"), lambda: None))

    return read


def based(home: Path) -> object:
    """On a base of others: everything that is read before its weights are."""
    cfg = validate(composed((f"model.name={home / 'base'}", "eval.sets=null", "data.eval_share=0")))
    return prepare_language(Context(cfg, home, 1, True, torch.device("cpu"), lambda: None))


def templated(home: Path) -> object:
    tokenizer = load_tokenizer("tiny", None, None, str(home / "template.jinja"))
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    return Encoder(tokenizer).encode({"messages": turns})


def in_cache(home: Path) -> object:
    """Each kind of entry, as it was when it was made."""
    cache = home / "cache"

    def fill(out: Path) -> str:
        (out / "deep").mkdir(parents=True)
        (out / "deep" / "a.bin").write_bytes(bytes(range(200)))
        return "here"

    def tokens(out: Path) -> str:
        store = Store(out)
        store.add("train", build([([1, 2, 3], [0.0, 1.0, 1.0], 1)]), rows_of([]))
        store.close({"rows": 1})
        return "there"

    place, origin = cached_directory(cache / "models" / "m", fill)
    assert (place / "deep" / "a.bin").read_bytes() == bytes(range(200)) and origin == "here"
    place, origin = cached_directory(cache / "data" / "k", tokens, whole=True)
    stored = load(place)
    assert list(stored.parts["train"].tokens[0:3]) == [1, 2, 3] and stored.report == {"rows": 1} and origin == "there"
    assert cached_json(cache / "measured" / "x.json", lambda: {"loss": 2.5, "n": [1, None]}) == {"loss": 2.5, "n": [1, None]}
    found = cached_tensors(cache / "reference" / "x.safetensors", lambda: {"a": torch.arange(6.0), "b": torch.zeros(2, 3)})
    assert found["a"].tolist() == [0, 1, 2, 3, 4, 5] and found["b"].shape == (2, 3)
    return list_cache([])


CASES = {
    "manifest, as init": Case("run/manifest.json", start_from),
    "manifest, on a page": Case("run/manifest.json", pages),
    "manifest": Case("run/manifest.json", lambda home: read_manifest(home / "run")),
    "config, as init": Case("run/config.yaml", start_from),
    "config, on a page": Case("run/config.yaml", pages),
    "config, of a run that goes on": Case("stopped/config.yaml", resume),
    "metrics, on a page": Case("run/metrics.jsonl", pages),
    "adapter config": Case("run/adapter/adapter_config.json", start_from),
    "adapter weights": Case("run/adapter/adapter_model.safetensors", start_from),
    "tokenizer": Case("run/adapter/tokenizer.json", start_from),
    "checkpoint record": Case("stopped/checkpoints/step-000001/checkpoint.json", checkpoints),
    "checkpoint weights": Case("stopped/checkpoints/step-000001/weights.safetensors", checkpoints),
    "checkpoint optimizer": Case("stopped/checkpoints/step-000001/optimizer.safetensors", checkpoints),
    "rows, jsonl": Case("rows.jsonl", rows("rows.jsonl")),
    "rows, json": Case("rows.json", rows("rows.json")),
    "rows, csv": Case("rows.csv", rows("rows.csv")),
    "rows, parquet": Case("rows.parquet", rows("rows.parquet")),
    "rows, arrow": Case("rows.arrow", rows("rows.arrow")),
    "rows, gzip": Case("rows.jsonl.gz", rows("rows.jsonl.gz")),
    "rows, xz": Case("rows.jsonl.xz", rows("rows.jsonl.xz")),
    "rows, zstd": Case("rows.jsonl.zst", rows("rows.jsonl.zst")),
    "rows, zip": Case("rows.zip", rows("rows.zip")),
    "rows, text": Case("rows.txt", rows("rows.txt")),
    "rows, to tokens": Case("rows.jsonl", prepared("rows.jsonl")),
    "recipe": Case("recipe.yaml", lambda home: load_recipe(str(home / "recipe.yaml"), [])),
    "experiment": Case("mine/experiment/e.yaml", lambda home: compose_run("sft", ["+experiment=e"], home / "mine")),
    "chat template": Case("template.jinja", templated),
    "base, config": Case("base/config.json", based),
    "base, tokenizer": Case("base/tokenizer.json", based),
    "base, tokenizer config": Case("base/tokenizer_config.json", based),
    "base, generation config": Case("base/generation_config.json", based),
    "base, weights": Case("base/model.safetensors", based),
    "cache, directory": Case("cache/models/m/deep/a.bin", in_cache, again=True),
    "cache, note": Case("cache/models/m/source.json", in_cache, again=True),
    "cache, tokens": Case("cache/data/k/train.tokens", in_cache, again=True),
    "cache, report": Case("cache/data/k/report.json", in_cache, again=True),
    "cache, note of tokens": Case("cache/data/k/source.json", in_cache, again=True),
    "cache, json": Case("cache/measured/x.json", in_cache, again=True),
    "cache, tensors": Case("cache/reference/x.safetensors", in_cache, again=True),
}  # fmt: skip
HEAVY = ("page", "base,", "cache,")  # in names of cases that take long


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one that was stopped, rows in many kinds of file, and a recipe."""
    import pyarrow
    from pyarrow import parquet

    home = tmp_path_factory.mktemp("fuzz")
    posttrain.run("sft", *TINY, f"run.dir={home / 'run'}")
    with pytest.raises(Stopped):
        posttrain.run("sft", *TINY, f"run.dir={home / 'stopped'}", "run.stop_after=1")
    found = [{"prompt": f"question {i}, with ünicode", "completion": f"answer {i * i}\nin two lines"} for i in range(12)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    (home / "rows.jsonl").write_text(lines)
    (home / "rows.json").write_text(json.dumps(found))
    (home / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (home / "rows.csv").write_text("prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in found))
    (home / "rows.txt").write_text("\n\n".join(row["completion"] for row in found))
    (home / "rows.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (home / "rows.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), "zstd", asbytes=True))
    with zipfile.ZipFile(home / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", lines)
    table = pyarrow.Table.from_pylist(found)
    parquet.write_table(table, home / "rows.parquet")
    with pyarrow.OSFile(str(home / "rows.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    shutil.copy(root("recipes") / "python_expert.yaml", home / "recipe.yaml")
    (home / "mine" / "experiment").mkdir(parents=True)
    (home / "mine" / "experiment" / "e.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\noptim:\n  lr: 0.001\ntrain:\n  max_steps: 2\n"
    )
    shutil.copytree(builtin_directory("tiny")[0], home / "base")
    (home / "base" / "source.json").unlink()
    (home / "template.jinja").write_text(CHATML)
    in_cache(home)
    return home


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if any(word in name for word in HEAVY) else []) for name in CASES]
)
def test_damaged_files_are_named_or_read_rightly(name: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, rng = CASES[name], random.Random(f"{SEED} {name}")
    file = whole / case.file
    content, refused = file.read_bytes(), 0
    try:
        for number in range(TIMES):
            file.write_bytes(damaged(content, rng))
            line = ""
            try:
                with limited():
                    case.read(whole)
            except (UserError, RunError) as error:
                refused += 1
                line = str(error)
            except BaseException as error:
                pytest.fail(f"input {number} of {name}: {type(error).__name__}: {error}\n{file.read_bytes()[:300]!r}")
            assert "\n" not in line and len(line) < 1000, f"input {number}"
    finally:
        file.write_bytes(content)
    assert refused >= TIMES // 10 or "page" in name or "text" in name or name in ("chat template", "base, weights") or case.again
    assert refused == 0 or not case.again
    capsys.readouterr()


def test_a_damaged_run_can_be_evaluated_or_is_named(whole: Path) -> None:
    """Weights that were cut short reach no model."""
    file = whole / "run" / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged: its sha256"):
        evaluate_runs([str(whole / "run")])
    file.write_bytes(content)
