"""What reaches the terminal: nothing from data steers it."""

import io

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from posttrain.commands.chat import _Streamer
from posttrain.console import Meter, console, printable, say
from posttrain.errors import UserError
from posttrain.launch.exit_codes import guarded
from posttrain.models.language.tokenizer import load_tokenizer

EVIL = "\x1b]0;title\x07\x1b[2Jx\x9b31m\r\x08\u202egnp.exe"


def test_controls_are_written_out_and_text_stays() -> None:
    assert printable(EVIL) == "\\x1b]0;title\\x07\\x1b[2Jx\\x9b31m\\x0d\\x08\\u202egnp.exe"
    plain = "tab\there\nnew line, äöü, 漢字, 👍🏽, [red]no style[/red], שלום"
    assert printable(plain) == plain


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The console on a terminal with colours."""
    out = io.StringIO()
    for name, value in (("_file", out), ("_force_terminal", True), ("_color_system", None), ("_width", 200)):
        monkeypatch.setattr(console, name, value)
    return out


def test_every_way_of_the_console_neutralises(terminal: io.StringIO) -> None:
    """Lines, tables and texts; the bar's own controls stay."""
    say(f"data {EVIL}")
    table = Table("name")
    table.add_row(f"[link=http://evil]{EVIL}[/link]")
    console.print(table)
    console.print(Text(EVIL, style="bold"))
    console.rule(EVIL)
    said = terminal.getvalue()
    assert said.count("\\x1b[2Jx\\x9b31m") == 4 and "[link=http://evil]" in said
    assert not [c for c in said if c in "\x1b\x07\x9b\r\x08\u202e"]
    with Progress(console=console) as bar:
        bar.add_task(EVIL)
    assert "\x1b[?25l" in terminal.getvalue() and "\x1b]0;" not in terminal.getvalue()


def test_errors_and_answers_are_neutral_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise UserError(f"data.path: {EVIL}")

    assert guarded(fails) == 2
    tokenizer = load_tokenizer("tiny", None, None, None)
    streamer = _Streamer(tokenizer, skip_special_tokens=True)
    for token in tokenizer(EVIL)["input_ids"]:
        streamer.put(__import__("torch").tensor([token]))
    streamer.end()
    said = capsys.readouterr()
    assert "\\x1b]0;title\\x07" in said.err and "\\x1b]0;title\\x07" in said.out
    assert not [c for c in said.out + said.err if c in "\x1b\x07\x9b\u202e"]


def test_a_run_goes_on_when_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`| head`, a closed terminal, a full disk below standard output: no exception, no exit, no further line."""
    for error in (BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), OSError(28, "No space left")):
        silenced = list[int]()

        class Gone(io.StringIO):
            def write(self, text: str, error: OSError = error) -> int:
                raise error

        monkeypatch.setattr(console, "_file", Gone())
        monkeypatch.setattr(console, "quiet", False)
        monkeypatch.setattr("posttrain.console.silence", lambda mine=silenced: mine.append(1))
        say("one")
        say("two")
        assert silenced == [1] and console.quiet


def test_the_time_that_is_left_is_known_after_the_first_unit_however_long(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 50 s: 150 s are left after two of five, 110 s within the third after 40 s more; never less than none."""
    now = [1000.0]
    monkeypatch.setattr("posttrain.console.time.monotonic", lambda: now[0])
    meter = Meter("sft", 7, start=2)
    assert meter.eta(now[0]) == "eta -:--"
    with meter:
        for _ in range(2):
            now[0] += 50
            meter.advance()
        assert meter.eta(1100.0) == "eta 2:30" and meter.eta(1140.0) == "eta 1:50" and meter.eta(9999.0) == "eta 0:00"
        meter.bar.refresh() if meter.bar else None
    assert "eta 2:30" in terminal.getvalue()
    meter = Meter("sft", 1000)
    now[0] += 50
    meter.advance()
    assert meter.eta(now[0]) == "eta 13:52:30"


def test_a_line_breaks_between_words_on_a_terminal_and_nowhere_else(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 20)
    path = "/a/path/that/is/longer/than/the/terminal.json"
    say(f"step 7: out of memory, see {path}; it goes on\nthen")
    assert terminal.getvalue().splitlines() == ["step 7: out of", "    memory, see", f"    {path};", "    it goes on", "then"]
    monkeypatch.setattr(console, "_force_terminal", False)
    terminal.truncate(0)
    terminal.seek(0)
    said = " ".join(["word"] * 20)
    say(said)
    assert terminal.getvalue() == said + "\n"
