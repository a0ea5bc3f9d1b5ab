"""A preview is what a run would read: weights as the loss takes them, and rows that are wrong, by number."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.commands.preview.findings import of_tokens
from posttrain.commands.preview.page import preview_page, show_preview
from posttrain.commands.preview.preview import Preview, histogram, make_preview, weights_of
from posttrain.config.compose import compose_run, validate
from posttrain.data.collate import pack, pack_pairs
from posttrain.data.examples import build, by_row
from posttrain.data.mixture import read_mixture
from posttrain.errors import UserError
from posttrain.runs.artifact import open_artifact
from posttrain.runs.manifest import Manifest
from posttrain.stages.language.init import InitSource
from posttrain.stages.language.prepare import open_language, rows_of
from posttrain.stages.language.summary import lines_of_data, lines_of_start
from posttrain.stages.spec import spec_of


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = [chat(f"What is {i}?", f"It is {i}.") for i in range(40)]


def preview(tmp_path: Path, rows: list[Any], *words: str, stage: str = "sft", looked: int | None = None) -> Preview:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return make_preview(stage, ["model=tiny", f"data.path={path}", "data.eval_share=0", *words], looked, 3)


def findings(found: Preview) -> dict[str, list[str]]:
    return {finding.what: finding.places for seen in found.sources for finding in seen.findings}


def test_good_rows_have_no_findings(tmp_path: Path) -> None:
    found = preview(tmp_path, GOOD)
    assert found.mistakes == [] and found.sources[0].stats.rows == 40
    ((segment,), *_) = found.units
    text = "".join(token.text for token in segment.tokens)
    row = GOOD[(segment.row or 0) - 1]["messages"]
    assert row[0]["content"] in text and row[1]["content"] in text
    assert "".join(token.text for token in segment.tokens if token.weight) == row[1]["content"] + "<|im_end|>"


def test_what_is_wrong_is_named_by_row(tmp_path: Path) -> None:
    marked = chat("a", "Hi [INST] <|im_end|>")
    rows: list[Any] = [*GOOD[:10], GOOD[3], chat("Long", "word " * 300), {"messages": []}, '{"messages": [', marked]
    found = findings(preview(tmp_path, rows, "train.max_length=64"))
    assert found["rows that repeat an earlier one"] == ["row 11 (as 4)"]
    assert found["rows cut to 64 tokens"] == ["row 12"]
    assert [place.split("rows.jsonl, ")[1].split(":")[0] for place in found["rows with a mistake"]] == ["row 13", "line 14"]
    assert found["rows with what looks like a special token, but is plain text to this tokenizer"] == ["row 15 ([INST])"]
    assert found["rows whose own words hold a special token of this tokenizer"] == ["row 15 (<|im_end|>)"]


def test_what_the_template_leaves_out_is_a_mistake(tmp_path: Path) -> None:
    thought = {"messages": [GOOD[0]["messages"][0], GOOD[0]["messages"][1] | {"reasoning_content": "hm"}]}
    tools = GOOD[1] | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    found = preview(tmp_path, [*GOOD[2:5], thought, tools])
    assert findings(found)["rows whose tools the chat template does not render"] == ["row 5"]
    (mistake,) = findings(found)["rows with a mistake"]
    assert mistake.split("rows.jsonl, ")[1].startswith("row 4: reasoning_content is not rendered by the chat template; ")
    assert len(found.mistakes) == 2
    warned = findings(preview(tmp_path, [*GOOD[2:5], thought], "data.on_loss=warn"))
    assert warned == {"rows whose reasoning_content the chat template does not render": ["row 4"]}


def test_each_turn_is_looked_at_as_it_is_trained(tmp_path: Path) -> None:
    """By a template that leaves the thoughts of earlier turns out."""
    (tmp_path / "last.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.thinking if loop.last and m.thinking else '') + m.content"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    thought = [{**m, "thinking": "hm. "} if m["role"] == "assistant" else m for row in GOOD[:2] for m in row["messages"]]
    words = ["data.turns=each", f"model.chat_template={tmp_path / 'last.jinja'}"]
    found = preview(tmp_path, [{"messages": thought}], *words)
    assert findings(found) == {} and found.sources[0].stats.rows == 1
    shown = {"".join(token.text for token in segment.tokens if token.weight) for unit in found.units for segment in unit}
    assert shown == {"hm. It is 0.<|im_end|>", "hm. It is 1.<|im_end|>"}
    assert [segment.row for segment in found.units[0]] == [1, 1]  # what both begin with is laid once


def test_a_part_that_is_marked_needs_no_end(tmp_path: Path) -> None:
    marks = [{"begin_offset": 0, "end_offset": 1, "train": True}]
    rows = [{"messages": [*row["messages"][:1], {**row["messages"][1], "train_detail": marks}]} for row in GOOD[:3]]
    assert findings(preview(tmp_path, rows, "model.chat_template=chatml")) == {}


def test_held_out_rows_that_are_trained_on_too(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(json.dumps(GOOD[5]) + "\n")
    found = findings(preview(tmp_path, GOOD, f"data.eval_path={tmp_path}/held.jsonl"))
    assert found == {"rows that are also held out": ["row 6"]}


def said_by_a_run(found: Preview, stage: str, words: list[str], cache: Path) -> None:
    """What a preview says first is what the run of the same words says."""
    cfg = validate(compose_run(stage, words))
    opened = open_language(cfg, weights=False)
    data = read_mixture(cfg.data, rows_of(cfg), opened.encoder, cfg.example_length, cache)
    lines = lines_of_start(cfg, opened.start, opened.base) + lines_of_data(cfg, data, opened.tokenizer)
    lines += spec_of(stage).lines_of(cfg)
    assert found.lines == lines and len(lines) > 2


@pytest.mark.parametrize("dedupe", ["none", "exact", "near"])
def test_overlaps_are_counted_as_a_run_counts_them(tmp_path: Path, dedupe: str) -> None:
    """And every other line that stands first is the run's too."""
    (tmp_path / "held.jsonl").write_text(json.dumps(GOOD[5]) + "\n")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [GOOD[5], GOOD[2], GOOD[39], GOOD[39]]))
    rows = [*(row | {"id": k} for k, row in enumerate(GOOD[:20])), GOOD[3], GOOD[3], GOOD[5]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=tiny", "data=mix", f"data.eval_path={tmp_path}/held.jsonl", f"data.dedupe={dedupe}", "train.max_length=64"]
    for name, file in (("a", "rows"), ("b", "more")):
        words += [f"data.sources.{name}.path={tmp_path}/{file}.jsonl", f"data.sources.{name}.share=0.5"]
    found = make_preview("sft", words, None, 1)
    a, b = (seen.stats for seen in found.sources)
    assert (a.repeated, a.also_held, a.shared, a.unused) == (2, 2, {}, {"id": 20 if dedupe == "none" else 19})
    assert (b.repeated, b.also_held, b.shared) == (1, 1, {"a": 1})
    left = "rows left out, they" if dedupe != "none" else "rows that"
    places = findings(found)
    assert places[f"{left} are in a as well"] == ["row 2"]
    if dedupe == "none":
        assert places["rows that are also held out"] == ["row 1"]  # of the second source
        assert places["rows that repeat an earlier one"] == ["row 4 (as 3)"]
        assert [finding.count for finding in found.sources[0].findings] == [2, 2]
    assert bool(found.mistakes) == (dedupe == "none")
    said_by_a_run(found, "sft", words, tmp_path / "cache")


def test_a_pair_a_prompt_and_a_document_are_shown_as_by_a_run(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "note": 1}) + "\n")
    for stage in ("dpo", "ppo"):
        words = ["model=tiny", f"data.path={tmp_path}/pairs.jsonl", "data.eval_share=0"]
        words += ["reward.function=posttrain.rewards:overlap"] if stage == "ppo" else []
        found = make_preview(stage, words, None, 1)
        said_by_a_run(found, stage, words, tmp_path / "cache")
        known = "[[a<|im_end|>]]\\n" if stage == "dpo" else ""  # a prompt is shown without the answer that is known to it
        (shown,) = (line for line in found.lines if "the first row" in line)
        assert shown.endswith("<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\n" + known)


def test_a_parents_format_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a preview as by a run: of init, and of a reward model that a policy's answers go to."""
    tiny = open_artifact("tiny", "init")
    plain = Manifest.model_validate(
        {"stage": "sft", "weights": {"kind": "model", "path": "m"}, "metrics": {}, "config_digest": "", "files": {}}
        | {"template": {"rows": "none", "texts": "none"}}
    )
    monkeypatch.setattr("posttrain.stages.language.prepare.open_artifact", lambda *_: replace(tiny, manifest=plain))
    monkeypatch.setattr("posttrain.stages.language.prepare.resolve_start", lambda *_: InitSource("tiny", "tiny", "tiny"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q"}) + "\n")
    words = ["model=tiny", f"data.path={tmp_path}/rows.jsonl", "data.eval_share=0", "init=a", "init_reward=b"]
    warnings = [line for line in make_preview("ppo", words, None, 1).lines if "warning" in line]
    assert [line.split("those of ")[1].split(" as plain")[0] for line in warnings] == ["init", "init_reward"]
    assert not [line for line in make_preview("ppo", [*words, "data.template=none"], None, 1).lines if "warning" in line]


def test_what_a_run_would_refuse_is_a_mistake(tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 90, "completion": "a"}, {"prompt": "q", "completion": "a"}]
    found = preview(tmp_path, rows, "train.max_length=32")
    assert "  1 rows left out, their prompts leave no room in 32 tokens (data.long_prompts=cut cuts them)" in found.lines
    (reason,) = [line for line in found.mistakes if "reason for which the run stops" in line]
    assert "data.path: 1 of 2 rows of" in reason and reason.endswith("data.long_prompts=cut cuts prompts at their beginning")
    with pytest.raises(UserError, match=r"the label of all 1 rows of .* is false, so there is nothing to learn"):
        preview(tmp_path, [{"prompt": "q", "completion": "a", "label": False}])
    wrong = preview(tmp_path, [GOOD[0], {"messages": []}])
    assert any("1 rows with a mistake, at which the run stops (data.on_error), the first: " in line for line in wrong.lines)
    assert any("1 rows skipped" in line for line in preview(tmp_path, [GOOD[0], {"messages": []}], "data.on_error=skip").lines)


def test_a_template_that_differs_for_inference(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    )
    found = findings(preview(tmp_path, GOOD[:3], f"model.chat_template={template}"))
    ((what, places),) = found.items()
    assert what.startswith("conversations whose prompt is rendered otherwise")
    assert len(places) == 3 and "'model" in places[0] and "'assistant" in places[0]


def test_a_doubled_beginning_and_a_missing_end() -> None:
    opened = open_language(validate(compose_run("sft", ["model=tiny"])), weights=False)
    encoder, tokenizer = opened.encoder, opened.tokenizer
    tokenizer.bos_token = "<|im_start|>"
    rows = [(1, {"text": "<|im_start|><|im_start|>a"}), (2, {"prompt": "a", "completion": "b"}), (3, {"text": "<|im_start|>a"})]
    found = {f.what: f.places for f in of_tokens(rows, encoder, tokenizer, str, 99) if f.count}
    assert found["rows that begin with the beginning-of-text token twice"] == ["1"]
    assert "answers that are trained without an end of turn" not in found
    # where nothing counts behind the marker, the end of turn does not either
    weighed = validate(compose_run("sft", ["model=tiny", "cot.marker='####'", "cot.answer_weight=0"]))
    opened = open_language(weighed, weights=False)
    encoder, tokenizer = opened.encoder, opened.tokenizer
    rows = [(7, {"prompt": "a", "completion": "b #### c"}), (8, {"prompt": "a", "completion": "b"}), (9, {"text": "b"})]
    found = {f.what: f.places for f in of_tokens(rows, encoder, tokenizer, str, 99) if f.count}
    assert found["answers that are trained without an end of turn"] == ["7"]


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    found = preview(tmp_path, [*GOOD, "not json " * 1000], looked=20)
    assert found.sources[0].stats.rows == 20 and not found.sources[0].complete and not found.mistakes


def test_weights_are_those_of_the_batch() -> None:
    pairs = build([([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 0.5, 2, 0, 1], 8)], [(2, 4)])
    assert weights_of(pack_pairs(pairs, [0])).tolist() == [0, 0, 1, 0.5, 2, 0, 1]
    weighed = build([([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 1, 0, 1], 8)], [(2, 4)], None, [3.0])
    assert weights_of(pack_pairs(weighed, [0])).tolist() == [0, 0, 3, 3, 3, 0, 3]
    documents = build([([5, 6, 7], [1, 1, 0.5], 1), ([8, 9], [1, 3], 2)])
    assert weights_of(pack(documents, [0, 1])).tolist() == [0, 1, 0.5, 0, 3]  # nothing predicts a first token
    turns = by_row(build([([1, 2, 8], [0, 0, 0.5], 1), ([1, 2, 3, 4], [0, 0, 0, 2], 1)]), 9)
    assert weights_of(pack(turns, [0])).tolist() == [0, 0, 0, 2, 0.5]  # 8 comes behind 1 and 2, which are laid once


def test_a_pairs_weight_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a:", "chosen": " b", "rejected": " c", "weight": 2.5}]
    found = preview(tmp_path, rows, "data.template=none", stage="dpo")
    assert [(part.what, part.weight) for part in found.units[0]] == [(what, 2.5) for what in ("prompt", "chosen", "rejected")]
    page = preview_page(found, tmp_path / "p.html").read_text()
    assert "chosen, row 1, weight 2.5, 2 tokens" in page and 'class="more" title="weight 2.5"' in page
    show_preview(found, tmp_path / "p.html")
    assert "▌rejected row 1 weight 2.5" in capsys.readouterr().out


def test_histogram() -> None:
    bars = histogram([1, 5, 12, 12, 24], 24)
    assert (bars[0], bars[-1], sum(n for _, _, n in bars)) == ((1, 2, 1), (23, 24, 1), 5)
    assert np.all(np.diff([low for low, _, _ in bars]) == 2)


def test_page_and_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = preview_page(preview(tmp_path, [*GOOD, GOOD[0]]), tmp_path / "p.html")
    page = path.read_text()
    assert "1 rows that repeat an earlier one: row 41 (as 1)" in page and 'class="one" title="weight 1"' in page
    words = ["preview", "sft", "model=tiny", "data.path=rows.jsonl", "data.eval_share=0"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "runs" / "preview-sft.html").exists()
    assert CliRunner().invoke(app, [*words, "--strict"]).exit_code == 2
