"""The model card: read by the hub's own library, true to the manifest, and its code loads the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import posttrain
from posttrain.models.language.loading import load_model
from posttrain.reports.card import hub_name, write_card
from posttrain.runs.directory import read_config
from posttrain.runs.files import write_text
from posttrain.runs.manifest import Base, read_manifest

WORDS = ("model=tiny", "train.max_steps=2", "train.batch_size=2", "data.max_rows=30", "data.eval_rows=4", "optim.lr=0.02")
WORDS += ("eval.rows=4",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "mine"
    posttrain.run("sft", *WORDS, "peft=lora", "peft.r=4", f"run.dir={folder}")
    return folder


def test_the_hub_reads_it_and_figures_are_the_manifest_s(run: Path) -> None:
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft", "license": "unknown", "pipeline_tag": "text-generation", "tags": ["posttrain", "sft", "lora"],
    }  # fmt: skip
    metrics = read_manifest(run).metrics
    assert f"| eval/loss | {metrics['eval/loss_before']:.4f} | {metrics['eval/loss']:.4f} | — |" in card.text
    assert f"Forgetting: {metrics['forgetting/percent']:+.2f} %" in card.text
    assert re.search(r"\| 100\.0% \| \d+ \| \d+ \| unknown \|", card.text) and "posttrain reproduce mine" in card.text
    assert not re.search(r"(?<![\w.)])/(tmp|root|home)\b", card.text)


def test_its_code_loads_the_result(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), re.S)
    assert code
    monkeypatch.chdir(run / "adapter")
    names: dict[str, object] = {}
    exec(code[1], names)
    ids = names["prompt"]["input_ids"]  # pyright: ignore
    live = load_model(run, dtype="float32").model
    assert (names["model"].float()(ids).logits - live(ids).logits).abs().max() < 1e-4  # pyright: ignore


def test_it_may_be_changed_and_no_digest_knows_it(run: Path) -> None:
    assert not [name for name in read_manifest(run).files if name.endswith("README.md")]
    before = (run / "manifest.json").read_bytes()
    (run / "adapter" / "README.md").write_text("Mine.")
    assert load_model(run).artifact.verified()
    write_card(run)
    assert (run / "manifest.json").read_bytes() == before


def test_intervals_stand_beside_their_figure_and_paths_are_cut(run: Path, tmp_path: Path) -> None:
    found = json.loads((run / "manifest.json").read_text())
    found["metrics"] = {"eval/accuracy": 0.75, "eval/accuracy_before": 0.5, "eval/accuracy_low": 0.6, "eval/accuracy_high": 0.85}
    rows = tmp_path / "secret place" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("")
    (rows.parent / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    found["data"][0]["source"] = str(rows)
    found["data"].append({"source": "photos", "pictures": 5})
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json",):
        write_text(tmp_path / "adapter" / name, (run / "adapter" / name).read_text())
    write_text(tmp_path / "config.yaml", (run / "config.yaml").read_text())
    write_text(tmp_path / "manifest.json", json.dumps(found))
    text = write_card(tmp_path).read_text()
    assert "| eval/accuracy | 50.0% | 75.0% | 60.0% to 85.0% |" in text and "| rows.jsonl | 100.0% | 30 |" in text
    assert "| cc-by-4.0 |\n| photos | — | 5 pictures | — | unknown |" in text
    assert "secret" not in text and read_config(tmp_path)["stage"] == "sft"


def test_names_of_bases() -> None:
    assert hub_name(Base(name="org/model", path="org/model")) == "org/model"
    assert hub_name(Base(name="org/model", path="/no/such/place")) is None
    assert hub_name(Base(name="smollm2")) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert [hub_name(Base(name=name)) for name in ("tiny", "/some/where", "./here/there", "tests/reports")] == [None] * 4


def test_what_is_of_the_hub_is_so_from_anywhere(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path looks like a name of the hub where it does not exist: the card is written again by push, elsewhere."""
    found = json.loads((run / "manifest.json").read_text())
    found["data"][0] |= {"source": "data/chat.jsonl", "fingerprint": "a" * 64}
    found["data"].append({"source": "org/rows", "fingerprint": "hub:org/rows@abc::train"})
    found["base"] |= {"name": "models/mine", "path": str(tmp_path / "models" / "mine")}
    _written_again(run, tmp_path, found)
    monkeypatch.chdir(tmp_path)
    head = ModelCard.load(write_card(tmp_path)).data.to_dict()
    assert head["datasets"] == ["org/rows"] and "base_model" not in head


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license: other\nlicense_name: mine\nlicense_link: https://a.b/c", {
            "license": "other", "license_name": "mine", "license_link": "https://a.b/c"
        }),
        ("license: other\nlicense_name: mine\nlicense_link: LICENSE", {"license": "other", "license_name": "mine"}),
    ],
)  # fmt: skip
def test_the_base_s_licence_is_kept_as_it_is_said(run: Path, tmp_path: Path, said: str, want: dict[str, object]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{said}\n---\n")
    found = json.loads((run / "manifest.json").read_text())
    found["base"] |= {"name": str(tmp_path / "base"), "path": str(tmp_path / "base")}
    _written_again(run, tmp_path, found)
    head = ModelCard.load(write_card(tmp_path)).data.to_dict()
    assert {key: value for key, value in head.items() if key.startswith("license")} == want


def _written_again(run: Path, place: Path, manifest: dict[str, object]) -> None:
    (place / "adapter").mkdir()
    write_text(place / "adapter" / "adapter_config.json", (run / "adapter" / "adapter_config.json").read_text())
    write_text(place / "config.yaml", (run / "config.yaml").read_text())
    write_text(place / "manifest.json", json.dumps(manifest))
