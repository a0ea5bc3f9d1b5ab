"""The pages in a browser: they answer to pointer and keyboard, load nothing, and axe has no complaint."""

import json
import math
import shutil
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.reports.test_run_page import make_run

from posttrain.commands.watch.folder import Folder
from posttrain.commands.watch.server import Server
from posttrain.reports.compare_page import compare_page
from posttrain.reports.recipe_page import recipe_page
from posttrain.reports.run_page import run_page
from posttrain.reports.sweep_page import sweep_page
from posttrain.runs.status import Status, write_status

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()
LOOKS = [(1200, "light"), (400, "dark")]
STEPS = 120


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    """One tab. It fails the test in which a page complains, or asks for what is elsewhere."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install 'posttrain[browser]'")
    with sync_api.sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        browser = playwright.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS, headless=True)
        tab = browser.new_page()
        tab.wrong = []
        tab.on("console", lambda message: tab.wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        tab.on(
            "request",
            lambda asked: None if asked.url.startswith(("file:", "http://127.0.0.1:", "data:")) else tab.wrong.append(asked.url),
        )
        yield tab
        browser.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of page: a run that is done, one that goes on, a sweep, a recipe, a comparison."""
    root = tmp_path_factory.mktemp("runs")
    lines: list[dict[str, Any]] = [{"step": 0, "eval/loss": 2.0, "general/loss": 3.0}]
    for step in range(1, STEPS + 1):
        loss = 1 + math.exp(-step / 30) + 0.1 * math.sin(7 * step)
        speed = {"train/tokens_per_second": 5000.0 + step}
        lines.append({"step": step, "tokens": step * 100, "train/loss": loss, "train/lr": 2e-4 * step / STEPS, **speed})
        lines += [{"step": step, "eval/loss": loss}] if step % 40 == 0 else []
    metrics = {
        "eval/loss": 1.1,
        "eval/loss_before": 2.0,
        "general/loss": 3.0001,
        "general/loss_before": 3.0,
        "forgetting/percent": 0.0,
    }
    for name in ("done", "other"):
        run = make_run(root / name, lines=lines, metrics=metrics, data="a-very-long-name-of-a-file-" * 4 + ".jsonl")
        answers = [
            {"label": label, "step": i, "text": f"{label} " * 30, "scores": {"f1": 0.5}}
            for i, label in enumerate(("before", "after"))
        ]
        (run / "samples.json").write_text(json.dumps([{"prompt": "Why?\n" * 3, "answers": answers, "reference": "_" * 300}]))
        for step in (0, 100):
            pictures = run / "samples" / f"step-{step}"
            pictures.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (128, 128), (30 * i, 90, step)).save(pictures / f"0-{i}.png")
        (run / "samples" / "index.json").write_text(json.dumps([{"kind": "instance", "prompt": "a photo of sks dog"}]))
        run_page(run)
    going = make_run(root / "going", lines=lines, finished=False)
    write_status(going, replace(Status.of_this_process(), steps=200, began=1.0))
    run_page(going)
    jobs = [
        {
            "overrides": {"peft.r": str(r), "optim.lr": f"{r}e-4"},
            "status": "done",
            "dir": str(root / name),
            "metrics": metrics | {"eval/loss": 1.0 + r / 10},
        }
        for r, name in ((2, "done"), (4, "other"))
    ]
    sweep_page(
        [*jobs, {"overrides": {"peft.r": "8"}, "status": "failed", "dir": "x", "metrics": {}, "error": "no memory"}],
        root / "sweep.html",
    )
    steps = [
        {"name": n, "stage": "sft", "dir": str(root / n), "status": "done", "why": "", "seconds": 5.0} for n in ("done", "other")
    ]
    recipe_page([*steps, {**steps[0], "name": "next", "dir": "x", "status": "running"}], root / "recipe.html")
    compare_page([root / "done", root / "other", going], root / "both.html")
    return root


@pytest.fixture
def shown(page: Any) -> Generator[Any]:
    """The tab, which must not have complained when the test is over."""
    page.wrong.clear()
    page.set_viewport_size({"width": 1200, "height": 900})
    yield page
    assert page.wrong == []


def complaints(page: Any, where: str, width: int, scheme: str) -> list[str]:
    """What axe finds, and whether the page is wider than the window."""
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(where)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    found = [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in Axe().run(page).response["violations"]]
    wide = page.evaluate("document.documentElement.scrollWidth")
    return found + ([f"{wide} pixels wide"] if wide > width else [])


@pytest.mark.parametrize("name", ["done/report", "going/report", "sweep", "recipe", "both"])
def test_axe_finds_nothing(shown: Any, place: Path, name: str) -> None:
    for width, scheme in LOOKS:
        assert complaints(shown, f"file://{place}/{name}.html", width, scheme) == [], (width, scheme)


def test_watch_is_live_keeps_what_was_chosen_and_compares(shown: Any, place: Path) -> None:
    with Server(Folder(place), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for width, scheme in LOOKS:
            assert complaints(shown, server.address, width, scheme) == [], (width, scheme)
        for name in ("done", "other"):
            shown.get_by_label(f"choose {name}", exact=True).check()
        with (place / "going" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": STEPS + 1, "train/loss": 0.1234}) + "\n")
        shown.get_by_text("121 of 200").wait_for(timeout=8000)
        shown.get_by_text("0.1234").wait_for(timeout=1000)
        assert (
            shown.get_by_label("choose done", exact=True).is_checked()
            and not shown.get_by_label("choose going", exact=True).is_checked()
        )
        shown.get_by_role("link", name="loss", exact=True).click()
        assert shown.locator("[aria-sort=ascending]").inner_text().startswith("loss")
        assert shown.locator("tbody th").first.inner_text() == "going", "it has the least"
        for name in ("done", "other"):
            shown.get_by_label(f"choose {name}", exact=True).check()
        shown.get_by_role("button", name="compare chosen runs").click()
        assert shown.locator("h1").inner_text() == "2 runs"
        shown.get_by_role("link", name="done").click()
        assert shown.locator("h1").inner_text().startswith("done")
        server.shutdown()


def test_a_curve_reads_its_values_to_the_pointer_and_to_the_keys(shown: Any, place: Path) -> None:
    shown.goto(f"file://{place}/done/report.html")
    figure = shown.locator("figure[data-plot]").first
    canvas, said = figure.locator(".canvas"), figure.locator(".readout")
    box = canvas.bounding_box()
    shown.mouse.move(box["x"] + 52 + (box["width"] - 64) / 2, box["y"] + 60)
    assert said.inner_text().startswith("step 60: train 1.")
    canvas.focus()
    canvas.press("Escape")
    canvas.press("ArrowRight")
    step = int(said.inner_text().split(":")[0].removeprefix("step "))
    assert step == 61
    for _ in range(3):
        canvas.press("ArrowLeft")
    assert said.inner_text().startswith("step 58:") and "(mean 1." in said.inner_text()
    shown.get_by_role("checkbox", name="log axis").focus()
    assert said.inner_text() == "", "what has lost the focus is silent"


def test_a_selection_zooms_all_curves_of_the_axis_and_back(shown: Any, place: Path) -> None:
    shown.goto(f"file://{place}/done/report.html")
    labels = lambda: [f.split("\n") for f in shown.locator("figure[data-plot] .canvas").all_inner_texts()]  # noqa: E731
    before = labels()
    box = shown.locator("figure[data-plot] .canvas").first.bounding_box()
    middle = box["x"] + 52 + (box["width"] - 64) / 2
    shown.mouse.move(middle, box["y"] + 60)
    shown.mouse.down()
    shown.mouse.move(middle + 60, box["y"] + 80, steps=4)
    assert shown.locator("rect.chosen").count() == 1
    shown.mouse.up()
    after = labels()
    assert len(after) == 3 and all(one != two for one, two in zip(before, after, strict=True))
    assert "60" in after[0] and "0" not in after[0] and "120" not in after[0]
    shown.get_by_role("button", name="show all").click()
    assert labels() == before
    canvas = shown.locator("figure[data-plot] .canvas").first
    canvas.press("+")
    assert labels() != before and shown.get_by_role("button", name="show all").is_enabled()
    canvas.press("0")
    assert labels() == before


def test_smoothing_and_the_log_axis_draw_anew(shown: Any, place: Path) -> None:
    shown.goto(f"file://{place}/done/report.html")
    lines = shown.locator("figure[data-plot]").first.locator("svg g path[fill=none]")
    assert lines.count() == 3, "the points, their mean, what was held out"
    smooth = lines.nth(1).get_attribute("d")
    slider = shown.get_by_role("slider", name="smoothing")
    slider.fill("25")
    assert lines.nth(1).get_attribute("d") != smooth
    slider.fill("0")
    assert lines.count() == 2
    linear = lines.nth(0).get_attribute("d")
    shown.get_by_role("checkbox", name="log axis").check()
    assert lines.nth(0).get_attribute("d") != linear


def test_without_scripts_there_are_pictures(shown: Any, place: Path) -> None:
    still = shown.context.browser.new_page(java_script_enabled=False) if shown.context.browser else None
    if still is None:
        text = (place / "done" / "report.html").read_text()
        assert text.count('<svg viewBox="0 0 420 220" role="img"') == 3
        return
    still.goto(f"file://{place}/done/report.html")
    assert still.locator("figure svg").count() == 3
    still.close()


def test_a_page_that_goes_on_looks_again_unless_it_is_paused(shown: Any, place: Path) -> None:
    path = place / "going" / "report.html"
    path.write_text(path.read_text().replace('data-refresh="10"', 'data-refresh="1"'))
    shown.goto(f"file://{path}")
    with shown.expect_navigation(timeout=4000):
        pass
    shown.get_by_role("button", name="pause").click()
    shown.evaluate("window.mine = 1")
    shown.wait_for_timeout(1600)
    assert shown.evaluate("window.mine") == 1
    old = path.read_text()
    path.write_text(old.replace('data-written="', 'data-written="1" data-was="'))
    shown.goto(f"file://{path}")
    assert "Nothing was written for" in shown.locator(".silence").inner_text()
    assert shown.locator("h1 .chip").inner_text() == "no news"
    path.write_text(old)


def test_no_other_script_runs_even_where_escaping_had_failed(page: Any, place: Path) -> None:
    """The browser refuses it by the page's policy."""
    path = place / "evil.html"
    path.write_text((place / "done" / "report.html").read_text().replace("<h2>", "<script>window.evil = 1</script><h2>", 1))
    page.wrong.clear()
    page.goto(f"file://{path}")
    assert page.evaluate("window.evil") is None and "Content Security Policy" in page.wrong[0]
