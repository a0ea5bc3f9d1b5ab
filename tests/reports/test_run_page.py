"""Pages of made-up runs: the right numbers in the right places, and nothing from data that a browser would run."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import os
import re
from pathlib import Path

import pytest
import yaml

from posttrain.errors import UserError
from posttrain.reports import pages
from posttrain.reports.compare_page import compare_page
from posttrain.reports.plots import Curve, line_figure, smoothed, thinned
from posttrain.reports.recipe_page import recipe_page
from posttrain.reports.run_page import _data_of, run_page
from posttrain.reports.run_records import before_and_after, chain_table, compare, read_record
from posttrain.reports.sweep_page import sweep_page

TEMPLATES = Path(pages.__file__).parent / "templates"
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>$x^2$'


def make_run(directory, *, stage="sft", metrics=None, parents=(), data="rows.jsonl", lr=0.1, lines=None, finished=True):
    directory.mkdir(parents=True)
    config = {
        "stage": stage,
        "model": {"name": "tiny"},
        "peft": {"method": "qlora"},
        "quant": {"method": "nf4"},
        "data": {"path": data},
        "optim": {"lr": lr},
        "train": {"max_steps": 4},
        "run": {"dir": str(directory)},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    if lines is None:
        lines = [{"step": 0, "eval/loss": 2.0}]
        lines += [{"step": i, "tokens": i * 10, "train/loss": 2.0 / i, "train/lr": 0.1} for i in (1, 2, 3, 4)]
        lines += [{"step": 4, "eval/loss": 1.0}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        source = {"source": data, "rows": 12, "tokens": 3456, "truncated": 7, "untrained": 1, "fingerprint": "ab" * 32}
        manifest = {
            "stage": stage,
            "parents": [{"role": "init", "path": str(p), "digest": "cd" * 32} for p in parents],
            "base": {"name": "tiny", "path": "/models/tiny", "revision": None},
            "weights": {"kind": "adapter", "path": "adapter"},
            "dtype": "bfloat16",
            "quant": {"method": "nf4"},
            "trainable": {"trained": 25_000, "total": 1_000_000},
            "data": [source | {"share": 1.0}],
            "held_out": source | {"rows": 3},
            "steps": 4,
            "tokens": 1234,
            "seconds": 61.7,
            "metrics": metrics or {"eval/loss": 1.0, "eval/loss_before": 2.0},
            "seed": 42,
            "device": "cpu",
            "config_digest": "ef" * 32,
            "code": {"commit": None, "dirty": None},
            "versions": {"torch": "2.13.0"},
            "files": {},
        }
        (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


class Page(html.parser.HTMLParser):
    """Tags, attributes and the text of every table row, as a browser would see them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.loaded, self.rows, self.handlers = [], [], [], [], []
        self.text, self.row, self.script, self.scripts, self.policy = "", None, None, [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.handlers += [name for name in found if name.startswith("on")]
        self.loaded += [found[name] for name in ("src", "xlink:href", "data") if found.get(name)]
        self.loaded += re.findall(r"url\(([^)]*)\)", found.get("style") or "")
        self.links += [found["href"]] if tag == "a" else []
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag in ("script", "style"):
            self.script = (found.get("type"), "")
        if tag == "tr":
            self.row = []
        elif tag in ("td", "th") and self.row is not None:
            self.row.append("")

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.scripts += [self.script] if tag == "script" else []
            self.script = None
        if tag == "tr" and self.row is not None:
            self.rows.append([" ".join(cell.split()) for cell in self.row])
            self.row = None

    def handle_data(self, data):
        if self.script:
            self.script = (self.script[0], self.script[1] + data)
            return
        self.text += data
        if self.row:
            self.row[-1] += f" {data}"


def test_a_runs_page_has_its_numbers(tmp_path):
    metrics = {"eval/loss": 1.0, "eval/loss_before": 2.0, "pairs/accuracy": 0.75, "pairs/accuracy_before": 0.5}
    metrics |= {"general/loss": 3.03, "general/loss_before": 3.0, "forgetting/percent": 1.0}
    page = Page(run_page(make_run(tmp_path / "a", metrics=metrics)))
    assert ["Loss, held out eval/loss", "2.0000", "1.0000", "✓ better: -50.00 %"] in page.rows
    assert ["Accuracy, pairs pairs/accuracy", "50.0%", "75.0%", "✓ better: +25.0 points"] in page.rows
    assert ["Loss, general text general/loss", "3.0000", "3.0300", "✗ worse: +1.00 %"] in page.rows
    assert ["rows.jsonl train", "12", "3,456", "100%", "7", "1", "abababababab"] in page.rows
    for said in ("+1.00 %", "1:02", "20 tokens/s on cpu", "25 k", "2.50% of 1 M", "2.13.0", "max_steps: 4"):
        assert said in page.text
    assert page.text.count("Learning rate") == 2  # its curve, and what it means
    assert "Accuracy of pairs" not in page.text


def test_ranks_are_drawn_by_layer_and_kind(tmp_path):
    run = make_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["peft"] = {"method": "adalora", "ranks": {f"layers.{i}.{kind}": i + 1 for i in (0, 1) for kind in ("q", "v")}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    page = run_page(run).read_text()
    assert "Ranks that were kept" in page and "from 0 (blank) to 2" in page
    assert len(re.findall(r"fill: var\(--c1\); opacity: 0\.5", page)) == 2  # rank 1 of 2


def test_a_page_loads_nothing_and_runs_our_script_alone(tmp_path):
    """By the hash in the page's policy a browser refuses any other. What is drawn is data, of a type that is never run."""
    page = Page(run_page(make_run(tmp_path / "a")))
    ours = (TEMPLATES / "plots.js").read_text()
    assert [text for kind, text in page.scripts if kind is None] == [ours]
    assert {kind for kind, _ in page.scripts} == {None, "application/json"}
    known = base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()
    assert f"script-src 'sha256-{known}'" in page.policy and page.policy.startswith("default-src 'none'")
    assert "unsafe" not in page.policy.replace("style-src 'unsafe-inline'", "")
    assert not {"link", "iframe", "object", "embed", "img"} & set(page.tags)
    assert all(address.startswith("#") for address in page.loaded), page.loaded
    assert page.tags.count("svg") == 2
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", (tmp_path / "a/report.html").read_text())


def test_what_comes_from_data_is_text(tmp_path):
    runs = [make_run(tmp_path / str(i) / "onclick=x", data=f"{i}{EVIL}", lr=i) for i in range(2)]
    (runs[0] / "samples.json").write_text(
        json.dumps([{"prompt": EVIL, "answers": [{"step": 0, "label": EVIL, "text": EVIL, "reward": 1.0}]}])
    )
    rows = [
        {"overrides": {EVIL: str(i)}, "status": "done", "dir": str(d), "metrics": {"eval/loss": 1.0 + i}}
        for i, d in enumerate(runs)
    ]
    rows.append({"overrides": {EVIL: "3"}, "status": "failed", "dir": "gone", "metrics": None, "error": EVIL})
    steps = [{"name": EVIL, "stage": "sft", "dir": str(runs[0]), "status": "done", "why": EVIL, "seconds": 1.0}]
    sweep_page(rows, tmp_path / "sweep.html")
    recipe_page(steps, tmp_path / "recipe.html")
    written = [
        run_page(runs[0]),
        tmp_path / "sweep.html",
        tmp_path / "recipe.html",
        compare_page(runs, tmp_path / "compare.html"),
    ]
    for page in map(Page, written):
        assert all(kind == "application/json" or text == (TEMPLATES / "plots.js").read_text() for kind, text in page.scripts)
        assert "img" not in page.tags
        assert page.handlers == []
        assert EVIL in page.text
    assert "svg" in Page(tmp_path / "sweep.html").tags


def test_a_run_under_way_has_a_page(tmp_path):
    lines = [{"step": 0, "eval/loss": 2.0}, {"step": 1, "tokens": 9, "train/loss": 1.5}]
    run = make_run(tmp_path / "a", finished=False, lines=lines)
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "train/lo')  # a line that is being written
    page = Page(run_page(run))
    assert ["Loss, held out eval/loss", "2.0000", "—", ""] in page.rows
    assert "of 4" in page.text
    assert "unfinished" in page.text and "running" not in page.text, "nobody says that it runs"


def test_numbers_that_are_not_finite_are_left_out_of_curves(tmp_path):
    lines = [{"step": i, "train/loss": value} for i, value in enumerate([1.0, math.nan, math.inf, 0.5])]
    record = read_record(make_run(tmp_path / "a", lines=lines))
    assert record.series("train/loss") == ([0, 3], [1.0, 0.5])


def test_lineage_goes_back_to_the_base(tmp_path):
    first = make_run(tmp_path / "runs" / "1 cpt", stage="cpt")
    second = make_run(tmp_path / "runs" / "2-sft", parents=[first])
    run_page(first)
    page = Page(run_page(make_run(tmp_path / "runs" / "3-dpo", stage="dpo", parents=[second])))
    assert page.links == ["./../1%20cpt/report.html"]  # 2-sft has no page
    order = [page.text.index(word) for word in ("base model", "1 cpt", "2-sft", "dpo, this run")]
    assert order == sorted(order)


def test_the_chain_counts_forgetting_from_its_start_and_changes_from_each_step(tmp_path):
    """general loss 2.0 -> 2.1 -> 2.05: +5 % and +2.5 % of the start, the second a gain of 2.5 points."""
    steps, before = [], {"general/loss": 2.0, "domain/loss": 3.0, "domain/perplexity": 20.0}
    for name, general, domain in (("cpt", 2.1, 10.0), ("sft", 2.05, 12.0)):
        after = {"general/loss": general, "domain/loss": math.log(domain), "domain/perplexity": domain}
        metrics = after | {f"{k}_before": v for k, v in before.items()} | {"forgetting/percent": 99.0}
        run = make_run(tmp_path / name, stage=name, metrics=metrics, parents=[tmp_path / "cpt"] if steps else [])
        run_page(run)
        steps.append({"name": name, "stage": name, "dir": str(run), "status": "done", "why": "", "seconds": 65.0})
        before = after
    columns, rows = chain_table([(s["name"], read_record(tmp_path / s["name"])) for s in steps])
    assert columns == ["domain/perplexity", "general/loss", "forgetting/percent"]
    assert [row.label for row in rows] == ["base", "after cpt", "after sft"]
    assert [row.values.get("forgetting/percent") for row in rows] == [None, pytest.approx(5.0), pytest.approx(2.5)]
    recipe_page(steps, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert ["base", "20.00", "2.0000", "—"] in page.rows
    assert ["after cpt", "10.00 ✓ better: -50.00 %", "2.1000 ✗ worse: +5.00 %", "+5.00 % ✗ worse: +5.00 points"] in page.rows
    assert ["after sft", "12.00 ✗ worse: +20.00 %", "2.0500 ✓ better: -2.38 %", "+2.50 % ✓ better: -2.50 points"] in page.rows
    assert page.links == ["./cpt/report.html", "./sft/report.html"]
    assert "1:05" in page.text


def sweep(tmp_path, losses, **extra):
    """losses: {(r, alpha): eval/loss or None for a failed job}."""
    rows = []
    for i, ((r, alpha), loss) in enumerate(losses.items()):
        row = {
            "overrides": [f"+peft.r={r}", f"peft.alpha={alpha}"],
            "status": "failed" if loss is None else "done",
            "dir": str(i),
        }
        rows.append(row | {"metrics": None if loss is None else {"eval/loss": loss}} | extra)
    sweep_page(rows, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def test_two_swept_numbers_make_a_map_with_its_best_cell(tmp_path):
    page = sweep(tmp_path, {(16, 32): 1.4, (4, 16): 1.2, (4, 32): 1.3, (16, 16): None}, error="no memory")
    assert page.rows[:3] == [
        ["peft.r ↓ peft.alpha →", "16", "32"],
        ["4", "1.2000 ★", "1.3000"],
        ["16", "—", "1.4000"],
    ]
    jobs = [row for row in page.rows if len(row) > 3 or "no memory" in row]
    assert [row[:4] for row in jobs[1:]] == [
        ["4", "16", "done", "1.2000"],
        ["4", "32", "done", "1.3000"],
        ["16", "32", "done", "1.4000"],
        ["16", "16", "failed", "no memory"],
    ]


def test_one_swept_number_makes_a_line(tmp_path):
    page = sweep(tmp_path, {(4, 16): 1.2, (64, 16): 1.1})
    assert page.tags.count("figure") == 1
    assert not any("↓" in cell for row in page.rows for cell in row)
    assert "best: r 64 with eval/loss 1.1000; all with peft.alpha=16" in page.text


def test_a_sweep_over_pictures_has_the_drift_of_each_set(tmp_path):
    metrics = {"eval/loss": 1.0, "class/loss": 1.2, "drift_class/percent": 3.0, "samples/count": 2.0}
    rows = [{"overrides": [f"peft.r={r}"], "status": "done", "dir": str(r), "metrics": metrics} for r in (2, 4)]
    sweep_page(rows, tmp_path / "report.html")
    jobs = [row for row in Page(tmp_path / "report.html").rows if row[:1] == ["2"]]
    assert jobs[0][1:5] == ["done", "1.0000", "1.2000", "+3.00 %"]


def test_a_failed_job_shows_the_last_line_of_its_log(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/job.log").write_text("step 1\nfailed: out of memory\n\n")
    page = sweep(tmp_path, {(4, 16): None, (8, 16): math.nan})
    assert any("failed: out of memory" in row for row in page.rows)
    assert "best:" not in page.text


def test_runs_compared_show_only_where_they_differ(tmp_path):
    a = make_run(tmp_path / "a", lr=0.1, metrics={"eval/loss": 1.5, "eval/loss_before": 2.0})
    b = make_run(tmp_path / "b", lr=0.2, metrics={"eval/loss": 1.25, "eval/loss_before": 2.0})
    page = Page(compare_page([a, b], tmp_path / "report.html"))
    assert ["optim.lr", "0.1", "0.2"] in page.rows
    assert not any(row[0].startswith(("model", "run")) and len(row) == 3 for row in page.rows)
    assert [row[3] for row in page.rows if row[0].endswith(("/a", "/b"))] == ["1.5000", "1.2500"]


def test_runs_of_different_stages_are_not_ranked_by_their_own_losses(tmp_path):
    metrics = [{"eval/loss": loss, "general/loss": general} for loss, general in ((2.0, 3.0), (0.6, 3.1))]
    a = make_run(tmp_path / "a", stage="sft", metrics=metrics[0])
    b = make_run(tmp_path / "b", stage="dpo", metrics=metrics[1])
    text = compare_page([a, b], tmp_path / "report.html").read_text()
    assert re.findall(r'<td class="n top">([^<]*)', text) == ["3.0000"]
    assert "Training loss, sft" in text
    assert "Training loss, dpo" in text


def test_runs_measured_on_other_rows_are_not_ranked(tmp_path):
    """Nor is a sweep's best job named then; on the same rows it is."""
    runs = [make_run(tmp_path / name, metrics={"eval/loss": loss}) for name, loss in (("a", 1.5), ("b", 1.2))]
    page = compare_page(runs, tmp_path / "report.html")
    assert re.findall(r'<td class="n top">([^<]*)', page.read_text()) == ["1.2000"]
    rows = [
        {"overrides": {"peft.r": str(i)}, "status": "done", "dir": str(run), "metrics": {"eval/loss": 1.5 - i / 10}}
        for i, run in enumerate(runs)
    ]
    assert "best: r 1" in sweep_page(rows, tmp_path / "sweep.html").read_text()
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    manifest["held_out"]["fingerprint"] = "01" * 32
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    text = compare_page(runs, tmp_path / "report.html").read_text()
    assert '<td class="n top">' not in text
    assert "Not held against each other" in text and "Loss, held out." in text
    text = sweep_page(rows, tmp_path / "sweep.html").read_text()
    assert "best:" not in text and "★" not in text and "measured on different rows: Loss, held out." in text


def test_answers_to_the_same_prompts_stand_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run, answer in zip(runs, ("four", "five"), strict=True):
        samples = [{"prompt": "2+2?", "answers": [{"step": 4, "label": "after", "text": answer, "scores": {}}]}]
        samples += [{"prompt": f"only {run.name}", "answers": samples[0]["answers"]}]
        (run / "samples.json").write_text(json.dumps(samples))
    text = compare_page(runs, tmp_path / "report.html").read_text()
    assert text.count('<p class="text">2+2?</p>') == 1 and text.index(">four<") < text.index(">five<")
    assert "only a" not in text


def test_what_is_no_run_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        run_page(tmp_path)


@pytest.mark.parametrize(
    ("name", "before", "after", "text", "verdict"),
    [
        ("eval/loss", 2.0, 1.5, "-25.00 %", "better"),
        ("x/perplexity", 10.0, 11.0, "+10.00 %", "worse"),
        ("x/accuracy", 0.5, 0.4, "-10.0 points", "worse"),
        ("eval/margin", 0.0, 1.5, "+1.5000", "better"),
        ("eval/logp_chosen", -10.0, -12.0, "-2.0000", ""),
        ("eval/loss", 1.00001, 1.00002, "+0.00 %", ""),
        ("eval/loss", 1.0, 1.0049, "+0.49 %", ""),
        ("eval/loss", 1.0, 1.0051, "+0.51 %", "worse"),
        ("x/accuracy", 0.5, 0.509, "+0.9 points", ""),
        ("eval/loss", 1.0, math.nan, "no number any more", "worse"),
        ("eval/loss", 1.0, math.inf, "no number any more", "worse"),
        ("eval/reward", 1.0, math.nan, "no number any more", "worse"),
        ("eval/logp_chosen", 1.0, math.nan, "no number any more", "worse"),
        ("eval/loss", math.nan, 1.0, "a number again", ""),
        ("eval/loss", math.nan, math.inf, "", ""),
    ],
)
def test_a_change_is_judged_by_what_the_metric_means(name, before, after, text, verdict):
    change = compare(name, before, after)
    assert (change.text, change.verdict) == (text, verdict)


def test_own_rows_come_first():
    metrics = {
        "a/loss": 1.0,
        "a/loss_before": 1.0,
        "eval/loss": 1.0,
        "eval/loss_before": 1.0,
        "forgetting/percent": 0.0,
    }
    assert [change.name for change in before_and_after(metrics)] == ["eval/loss", "a/loss"]


def test_moving_average_has_no_bias_at_the_start():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smoothed([1.0, 3.0])[1] == pytest.approx((0.5 * 1 + 3) / 1.5)  # the newest counts twice the one before


def test_long_curves_are_drawn_by_means():
    assert thinned([float(i) for i in range(10)], most=5) == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert sum(thinned([float(i) for i in range(1200)])) / 600 == pytest.approx(599.5)


def test_colours_follow_the_page():
    figure = line_figure("t", [Curve("a", [0.0, 1.0], [0.0, 1.0], color=3), Curve("b", [], [])])
    assert figure is not None
    assert "var(--c3)" in figure.svg
    assert "#0a0b" not in figure.svg
    assert line_figure("t", [Curve("b", [], [])]) is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "my.jsonl", "sources": None}, "my.jsonl"),
        ({"instance_dir": "photos"}, "photos"),
        ({"path": None, "sources": {"a": {}, "b": {}}}, "a mixture of a, b"),
    ],
)
def test_a_page_says_what_the_run_learnt_from(data, said):
    assert _data_of(data) == said


def test_half_a_letter_in_a_file_or_a_name_of_bytes_is_no_end_of_a_page(tmp_path):
    run = make_run(tmp_path / os.fsdecode(b"caf\xe9"))
    (run / "samples.json").write_text(json.dumps([{"prompt": "a\ud83d", "answers": [], "reference": "b\udcff"}]))
    page = run_page(run).read_text(encoding="utf-8")
    assert "caf?" in page and "a?" in page
    assert "caf?" in compare_page([run, make_run(tmp_path / "other")], tmp_path / "both.html").read_text(encoding="utf-8")
