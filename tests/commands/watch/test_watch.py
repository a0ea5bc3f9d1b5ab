"""The server of runs: what it shows, and all that it must not."""

import http.client
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.reports.test_run_page import make_run

from posttrain.commands.local_server import HOME
from posttrain.commands.watch.folder import Folder, SeenRun, is_own
from posttrain.commands.watch.pages import COLUMNS, Asked, ago, answer, in_order, table_html
from posttrain.commands.watch.server import Server
from posttrain.commands.watch.watch import watch
from posttrain.errors import UserError
from posttrain.runs.status import Status, write_status

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, one that goes on, one that has failed; a sweep of two jobs, a recipe of two steps."""
    root = tmp_path_factory.mktemp("place") / "runs"
    make_run(root / "sft" / "done", metrics={"eval/loss": 1.25, "eval/loss_before": 2.0})
    going = make_run(
        root / "sft" / "going", finished=False, lines=[{"step": 3, "train/loss": 1.5, "train/tokens_per_second": 5333.3}]
    )
    write_status(going, replace(Status.of_this_process(), steps=9))
    failed = make_run(root / "dpo" / EVIL.replace("/", "_"), stage="dpo", finished=False, lines=[])
    write_status(failed, Status("failed", f"the disk is full {EVIL}"))
    jobs = [{"overrides": {"peft.r": str(r)}, "dir": f"/elsewhere/{r}"} for r in (2, 4)]
    for i, job in enumerate(jobs):
        make_run(root / "sweep" / Path(job["dir"]).name, metrics={"eval/loss": 1.5 - i / 10})
    (root / "sweep" / "jobs.json").write_text(json.dumps(jobs))
    make_run(root / "recipe" / "1-cpt", stage="cpt")
    for step in ("1-cpt", "2-sft"):
        (root / "recipe" / f"{step}.digest.json").write_text("{}")
    (root.parent / "secret.txt").write_text("do not read")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Generator[Server]:
    with Server(Folder(folder), 0) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield served
        served.shutdown()


def ask(server: Server, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str, dict[str, str]]:
    """Status, body and headers, as sent: nothing is tidied by a library on the way."""
    connection = http.client.HTTPConnection(HOME, server.server_address[1], timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"localhost:{server.server_address[1]}" if host is None else host)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body, dict(response.getheaders())


def rows_of(page: str) -> dict[str, list[str]]:
    """By name, what the table says of each run."""
    found = {}
    for row in re.findall(r'<tr><td><input type="checkbox" name="run" value="([^"]*)".*?</tr>', page):
        line = next(line for line in page.splitlines() if f'value="{row}"' in line)
        found[row] = [re.sub(r"<[^>]*>", " ", cell).split() for cell in re.findall(r"<td.*?</td>", line)[1:]]
        found[row] = [" ".join(cell) for cell in found[row]]
    return found


def test_the_table_has_every_run_with_its_figures(server: Server) -> None:
    status, page, _ = ask(server, "/")
    rows = rows_of(page)
    assert status == 200 and set(rows) == {
        "sft/done", "sft/going", "dpo/&lt;script&gt;alert(1)&lt;_script&gt;", "sweep/2", "sweep/4", "recipe/1-cpt",
    }  # fmt: skip
    assert rows["sft/going"][:5] == ["running", "3 of 9", "1.5000", "", "5,330"]
    assert rows["sft/going"][6:] == ["sft", "qlora over nf4", "tiny"]
    assert rows["sft/done"][:4] == ["done", "4", "0.5000", "1.2500"]
    assert "6 runs: 1 running, 4 done, 1 failed" in page
    assert '<a href="/sweep/report.html">sweep</a></th><td>sweep</td><td><span class="chip done">' in page
    assert '<a href="/recipe/report.html">recipe</a></th><td>recipe</td><td><span class="chip unfinished">' in page


def test_pages_of_runs_sweeps_recipes_and_comparisons(server: Server) -> None:
    assert "<h1>going <span" in ask(server, "/sft/going/report.html")[1]
    sweep = ask(server, "/sweep/report.html")[1]
    assert "best: r 4 with eval/loss 1.4000" in sweep
    recipe = ask(server, "/recipe/report.html")[1]
    assert "after cpt" in recipe and '<span class="chip to do">to do</span>' in recipe
    status, page, _ = ask(server, "/compare?run=sft/done&run=sft/going")
    assert status == 200 and "Where their configs differ" in page and "data-written=" in page, "one of them goes on"
    assert ask(server, "/compare")[0] == 400 and ask(server, "/compare?run=nowhere")[0] == 404
    assert ask(server, "/compare?" + "&".join(["run=sft/done"] * 201))[0] == 400
    assert ask(server, "http://[/")[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//etc/passwd", "/sft/done/config.yaml", "/sft/done/",
        "/sft/../../secret.txt/report.html", "/..%2f..%2f/report.html", "/sft/done/../../../secret.txt", "/%00/report.html",
        "http://elsewhere/secret.txt", "/sft/report.html", "/.", "/\\..\\secret.txt",
    ],
)  # fmt: skip
def test_no_path_leads_out_and_no_file_is_given_out(server: Server, path: str) -> None:
    status, body, _ = ask(server, path)
    assert status == 404 and body in ("there is no such page", "there is no such run")
    assert ask(server, f"/compare?run={path}")[0] == 404


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1]",
        "[",
        "a@localhost",
        "10.0.0.1",
    ],
)
def test_a_name_that_is_not_ours_gets_nothing(server: Server, host: str) -> None:
    """DNS rebinding: a page of evil.example, whose name is now that of this machine."""
    status, body, headers = ask(server, "/", host=host)
    assert (status, "sft" in body) == (403, False) and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9000"])
def test_a_tunnel_may_have_another_port(server: Server, host: str) -> None:
    assert ask(server, "/", host=host)[0] == 200


def test_it_listens_to_this_machine_alone_and_only_reads(server: Server, folder: Path) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    before = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert [ask(server, "/", method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [501] * 4
    status, body, headers = ask(server, "/", "HEAD")
    assert (status, body) == (200, "") and int(headers["Content-Length"]) > 1000
    assert sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_nothing_from_a_run_is_markup_or_runs(server: Server) -> None:
    _, page, headers = ask(server, "/")
    assert EVIL not in page and "the disk is full &lt;script&gt;" in page
    assert "connect-src 'self'" in page and "script-src 'sha256-" in page and page.count("<script>") == 1
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["Cache-Control"] == "no-store"


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither a run that is a link, nor one whose files are; nor a sweep's list of jobs."""
    outside = make_run(tmp_path / "outside" / "run")
    root = tmp_path / "runs"
    mine = make_run(root / "mine")
    (root / "linked").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    assert set(Folder(root).runs()) == {"mine"} and is_own(mine)
    for name in ("metrics.jsonl", "samples.json", "held_out.json", "manifest.json", "config.yaml"):
        run = make_run(root / f"by-{name}")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "outside" / "run" / name)
    pictures = make_run(root / "pictures")
    (pictures / "samples" / "step-0").mkdir(parents=True)
    (pictures / "samples" / "step-0" / "0-0.png").symlink_to(tmp_path / "outside.png")
    assert set(Folder(root).runs()) == {"mine"}


def test_a_run_that_changes_is_read_again_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs" / "a", finished=False, lines=[{"step": 1, "train/loss": 2.0}])
    seen = Folder(tmp_path / "runs")
    assert seen.runs()["a"].step == 1
    monkeypatch.setattr("posttrain.commands.watch.folder.read_config", None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/loss": 1.0}\n{"step": 3, "tra')
    again = seen.runs()["a"]
    assert (again.step, again.figures["train/loss"]) == (2, 1.0)
    shutil.rmtree(run)
    assert seen.runs() == {}


@pytest.mark.parametrize(
    ("file", "text"),
    [("config.yaml", "stage: ["), ("config.yaml", "3"), ("manifest.json", "{"), ("manifest.json", "[]"), ("manifest.json", "")],
)
def test_a_damaged_run_is_listed_as_one_and_the_others_as_they_are(file: str, text: str, tmp_path: Path) -> None:
    make_run(tmp_path / "good")
    bad = make_run(tmp_path / "bad")
    (bad / file).write_text(text)
    folder = Folder(tmp_path)
    found = folder.runs()
    assert [found[name].state for name in ("bad", "good")] == ["damaged", "done"] and file in found["bad"].why
    table = table_html(folder, found, Asked("", {}))
    assert "2 runs: 1 done, 1 damaged" in table and '<span class="chip damaged">' in table
    status, said = answer(folder, Asked("bad/report.html", {}))
    assert status == 500 and "\n" not in said and file in said


def test_order_is_by_value_and_what_is_not_known_comes_last() -> None:
    def run(name: str, loss: float | None, step: int) -> SeenRun:
        figures = {} if loss is None else {"train/loss": loss}
        return SeenRun(name, Path(name), "sft", "m", "lora", "done", "", step, 9, 0.0, figures)

    runs = {each.name: each for each in (run("d", math.nan, 1), run("a", 2.0, 10), run("b", None, 9), run("c", 0.5, 100))}
    assert [each.name for each in in_order(runs, "loss", down=False)] == ["c", "a", "d", "b"]
    assert [each.name for each in in_order(runs, "loss", down=True)] == ["a", "c", "d", "b"]
    assert [each.name for each in in_order(runs, "step", down=True)] == ["c", "a", "b", "d"]
    assert COLUMNS["changed"].down and not COLUMNS["loss"].down


def test_the_heads_say_how_the_table_is_sorted(server: Server) -> None:
    page = ask(server, "/?sort=loss&order=up")[1]
    assert (
        page.count("aria-sort=") == 1
        and 'aria-sort="ascending" class="n"><a class="sort" href="?sort=loss&amp;order=down">' in page
    )
    assert 'aria-sort="descending"' in ask(server, "/?sort=nonsense")[1]


def test_what_is_wrong_is_one_line(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        watch(tmp_path / "nowhere", 0)
    with pytest.raises(UserError, match=r"--port: \d+ is taken; give another, or 0"):
        watch(tmp_path, server.server_address[1])


def test_times_are_for_people() -> None:
    assert [ago(seconds) for seconds in (-1, 59, 119, 120, 7199, 7200, 172799, 172800)] == [
        "0 s ago", "59 s ago", "119 s ago", "2 min ago", "119 min ago", "2 h ago", "47 h ago", "2 d ago",
    ]  # fmt: skip


def test_a_run_whose_name_is_no_utf8_can_be_opened(tmp_path: Path) -> None:
    make_run(tmp_path / os.fsdecode(b"caf\xe9"))
    with Server(Folder(tmp_path), 0) as server:
        page = server._page("/")
        assert page.status == 200 and b'href="/caf%E9/report.html"' in page.content
        assert server._page("/caf%E9/report.html").status == server._page("/compare?run=caf%E9").status == 200
