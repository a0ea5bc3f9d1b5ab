"""What a run says of its rows before it begins: an example, and whether they are rendered as its parent's were."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.config.stages import typed_config
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.template_text import CHATML
from posttrain.data.mixture import read_mixture
from posttrain.errors import UserError
from posttrain.stages.language.init import InitSource
from posttrain.stages.language.prepare import open_language, template_of
from posttrain.stages.language.summary import example_of, lines_of_data, lines_of_template
from posttrain.stages.spec import row_uses

CHAT = "<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\n[[a<|im_end|>]]\\n"
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "sft": ({"prompt": "q", "completion": "a"}, CHAT, "q[[a<|im_end|>]]"),
    "dpo": ({"prompt": "q", "chosen": "a", "rejected": "b"}, CHAT, "q[[a<|im_end|>]]"),
    "cpt": ({"text": "one"}, "[[one<|im_end|>]]", "[[one<|im_end|>]]"),
}  # fmt: skip


@pytest.mark.parametrize("stage", ROWS)
def test_the_first_row_is_shown_as_the_model_sees_it(make_tokenizer: Any, tmp_path: Path, stage: str) -> None:
    row, as_chat, as_text = ROWS[stage]
    tokenizer = make_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>", bos=None)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    cfg = validate(compose_run(stage, [f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_share=0"]))
    for template, shown in ((True, as_chat), (False, as_text)):
        encoder = Encoder(tokenizer).templated(template)
        data = read_mixture(cfg.data, row_uses()[stage], encoder, 64, tmp_path / "cache")
        record = template_of(data, encoder, stage == "cpt")
        name = "chat" if template else "none"
        assert record.to_dict() == {"rows": name, "texts": name}
        assert example_of(data.parts[0], tokenizer, 200) == [f"  the first row, [[trained]]: {shown}"]


def test_rows_that_are_rendered_otherwise_than_the_parents_are_warned_of() -> None:
    assert lines_of_template("none", "chat", "init") == [
        "  warning: the rows are rendered as plain text, those of init by the chat template; data.template=chat renders prompts "
        "that are texts as init has them"
    ]
    assert lines_of_template("chat", "chat", "init") == lines_of_template("chat", None, "init") == []


def test_what_a_stage_starts_from_decides_how_texts_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model stops at its template's end of turn. A run says how its rows were rendered; the config has the last word."""
    found = {}
    for before in (None, "none", "chat"):
        start = InitSource("tiny", "tiny", "tiny", template=before)
        monkeypatch.setattr("posttrain.stages.language.prepare.resolve_start", lambda cfg, weights, start=start: start)
        for setting in ("auto", "chat", "none"):
            cfg = typed_config(compose_run("dpo", ["model=tiny", f"data.template={setting}", "data=python_preferences"]))
            found[before, setting] = open_language(cfg, weights=False).encoder.options.template  # type: ignore[arg-type]
    assert [found[before, "auto"] for before in (None, "none", "chat")] == [True, False, True]
    assert {found[key] for key in found if key[1] == "chat"} == {True} and {found[key] for key in found if key[1] == "none"} == {
        False
    }


def test_a_template_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch, make_tokenizer: Any) -> None:
    monkeypatch.setattr("posttrain.stages.language.prepare.load_tokenizer", lambda *_: make_tokenizer(None))
    cfg = typed_config(compose_run("sft", ["model=tiny", "data.template=chat"]))
    with pytest.raises(UserError, match=r"^data\.template: this tokenizer has no chat template"):
        open_language(cfg, weights=False)  # type: ignore[arg-type]


def lines_of_rows(tokenizer: Any, folder: Path, count: int, *words: str) -> list[str]:
    """What is said of `count` rows."""
    rows = [json.dumps({"text": f"row {k}"}) + "\n" for k in range(count)]
    (folder / "rows.jsonl").write_text("".join(rows))
    cfg = validate(compose_run("cpt", [f"data.path={folder / 'rows.jsonl'}", *words]))
    return lines_of_data(cfg, read_mixture(cfg.data, row_uses()["cpt"], Encoder(tokenizer), 64, folder / "cache"), tokenizer)


@pytest.mark.parametrize(
    ("count", "words", "said"),
    [
        (12, ["data.eval_share=0.001"], "0 rows held out, of at most 16 (data.eval_share=0.001)"),
        (12, ["data.eval_share=0.9"], "9 rows held out, of at most 16 (data.eval_share=0.9)"),
        (400, [], "16 rows held out"),
        (12, ["data.eval_share=0"], "0 rows held out"),
        (12, ["data.eval_path={}/rows.jsonl"], "12 rows held out, of at most 16 (data.eval_path)"),
    ],
)  # fmt: skip
def test_fewer_rows_held_out_than_asked_for_are_said(
    make_tokenizer: Any, tmp_path: Path, count: int, words: list[str], said: str
) -> None:
    words = ["data.eval_rows=16", *(word.format(tmp_path) for word in words)]
    first, *rest = lines_of_rows(make_tokenizer(None), tmp_path, count, *words)
    assert first.endswith(f" trained; {said}")
    warned = [line for line in rest if line.startswith("  warning: no row is held out")]
    assert warned == (
        ["  warning: no row is held out, so the run is not measured on its own data: of these rows, chosen by their content, "
         "none is in data.eval_share=0.001; a larger share, or data.eval_path"] if said.startswith("0 rows held out, of") else []
    )  # fmt: skip
