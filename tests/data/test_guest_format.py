"""A data format of another package: one module and an entry point, and it is read, trained on, previewed and refused as ours."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain
from posttrain.commands.preview.preview import make_preview
from posttrain.config.compose import compose_run, validate
from posttrain.data.formats import FORMATS, check_fits, recognise
from posttrain.data.mixture import read_mixture
from posttrain.data.prepare import prepare_set
from posttrain.data.row_use import RowUse
from posttrain.errors import UserError
from posttrain.models.language.tokenizer import load_tokenizer, make_encoder
from posttrain.stages.spec import row_uses

MODULE = """
from posttrain.data.formats import Format
from posttrain.errors import UserError


def chat(row):
    if not row["said"]:
        raise UserError("said is empty")
    return {"messages": [{"role": "user", "content": row["asked"]}, {"role": "assistant", "content": row["said"]}]}


FORMAT = Format(
    columns="asked and said",
    kind="KIND",
    precedence=PRECEDENCE,
    recognises=lambda row: "asked" in row and "said" in row,
    to_canonical=chat,
    example={"asked": "q", "said": "a"},
    example_becomes={"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
)
"""
ROWS = [{"asked": f"What is {i} plus 1?", "said": f"It is {i + 1}.", "text": "not this"} for i in range(20)]


def install(folder: Path, kind: str = "messages", precedence: int = 25) -> None:
    """What pip leaves of a package with this format, in place of the one before."""
    info = folder / "guest-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.data_formats]\ndialogue = guest_dialogue\n")
    (folder / "guest_dialogue.py").write_text(MODULE.replace("KIND", kind).replace("PRECEDENCE", str(precedence)))
    sys.modules.pop("guest_dialogue", None)
    FORMATS.forget()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module that changes twice a second would be read from its bytecode
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    yield tmp_path
    sys.modules.pop("guest_dialogue", None)
    FORMATS.forget()


def test_sft_trains_on_it(site: Path) -> None:
    words = ["model=tiny", "+peft=lora", "train.max_steps=1", "train.batch_size=2", "eval.sets=null", "data.eval_share=0"]
    words += [f"data.path={site}/rows.jsonl"]
    manifest = posttrain.run("sft", *words, f"run.dir={site}/run")
    (source,) = manifest["data"]
    assert (source["shape"], source["rows"], source["untrained"]) == ("dialogue", 20, 0)
    assert {key: manifest["held_out"][key] for key in ("rows", "eval_rows", "eval_share")} == {
        "rows": 0,
        "eval_rows": 64,
        "eval_share": 0,
    }
    seen = make_preview("sft", [*words, "data.shape=dialogue"], None, 1)
    assert "It is " in "".join(token.text for token in seen.units[0][0].tokens if token.weight)


def test_a_wrong_row_names_its_place(site: Path) -> None:
    (site / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"asked": "q", "said": ""}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2: said is empty"):
        make_data(site)


def make_data(site: Path) -> str:
    """The key in the cache of what sft makes of the rows."""
    data = validate(compose_run("sft", [f"data.path={site}/rows.jsonl", "data.eval_share=0"])).data
    encoder = make_encoder(load_tokenizer("tiny", None, None, None), "tiny", None)
    return read_mixture(data, row_uses()["sft"], encoder, 64, site / "cache").key


def test_its_code_names_what_lies_in_the_cache(site: Path) -> None:
    before = make_data(site)
    assert make_data(site) == before
    install(site, precedence=26)
    assert make_data(site) != before


def test_what_does_not_take_it_says_what_does(site: Path) -> None:
    with pytest.raises(
        UserError, match=r"cpt does not take dialogue \(asked and said\); use posttrain sft or ppo, or give data with a text"
    ):
        check_fits("dialogue", row_uses()["cpt"])
    install(site, kind="labelled")
    with pytest.raises(UserError, match=r"sft does not take dialogue \(asked and said\); give data with messages"):
        check_fits("dialogue", row_uses()["sft"])
    encoder = make_encoder(load_tokenizer("tiny", None, None, None), "tiny", None)
    with pytest.raises(
        UserError, match=r"rows\.jsonl: no evaluation takes dialogue; give one of text, messages, prompt_completion, pairs"
    ):
        prepare_set(f"{site}/rows.jsonl", 4, encoder, 64)


def test_two_formats_of_one_precedence_are_told_apart_by_the_user(site: Path) -> None:
    assert recognise(ROWS[0]) == "dialogue"
    install(site, precedence=5)
    assert recognise(ROWS[0]) == "text"
    install(site, precedence=FORMATS.get("text").precedence)
    with pytest.raises(
        UserError, match=r"the columns asked, said, text fit dialogue and text; give data\.shape=dialogue or another"
    ):
        recognise(ROWS[0])


def test_an_unknown_kind_of_examples_is_no_silent_default(site: Path) -> None:
    data = validate(compose_run("sft", [f"data.path={site}/rows.jsonl"])).data
    encoder = make_encoder(load_tokenizer("tiny", None, None, None), "tiny", None)
    use = RowUse("kto", ("messages",), "labels", "labels")
    with pytest.raises(UserError, match=r"kto: there is no kind of examples 'labels' \(there are: documents, conversations, "):
        read_mixture(data, use, encoder, 64, site / "cache")
