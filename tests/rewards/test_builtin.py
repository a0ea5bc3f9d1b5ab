"""Rewards that are built in: by hand, and against a model and an endpoint that stand in for real ones."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.choices import REWARDS
from posttrain.errors import BeforeStep, UserError
from posttrain.rewards import load_function
from posttrain.rewards.builtin._truth import final_answer, number_in


def scores(
    name: str, answers: list[str], references: list[str] | None = None, options: dict[str, Any] | None = None, **columns: Any
) -> list[Any]:
    function = load_function(name, "reward.function", {name: options or {}})
    found = function(["p"] * len(answers), answers, references or [""] * len(answers), columns).tolist()
    return [None if value != value else round(value, 6) for value in found]


def test_there_are_these() -> None:
    assert REWARDS.names() == [
        *("classifier", "code", "exact", "f1", "json_schema", "judge", "length", "maths", "numeric", "regex", "rouge_l"),
    ]


@pytest.mark.parametrize(
    ("text", "final", "number"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7", 7.0),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}", 0.5),
        ("#### $1,234.50", "$1,234.50", 1234.5),
        ("about 50%", "about 50%", 50.0),
        ("-3/4", "-3/4", -0.75),
        ("none", "none", None),
        (r"\boxed{1} then \boxed{2", "2", 2.0),
        ("1e3", "1e3", 1000.0),
        ("1/0", "1/0", None),
    ],
)
def test_what_a_text_comes_to(text: str, final: str, number: float | None) -> None:
    assert final_answer(text) == final and number_in(final_answer(text)) == number


def test_exact_and_numeric() -> None:
    assert scores("exact", [r"\boxed{ Paris }", "paris", "Rome"], ["Paris"] * 3) == [1, 1, 0]
    assert scores("exact", ["paris"], ["x"], {"case": True, "column": "town"}, town=["Paris"]) == [0]
    # GSM8K: the row's own answer ends in #### and a number
    gsm8k = "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 1,072"
    assert scores("numeric", ["it is 1072", "#### 1072.0", "1073", "nothing"], [gsm8k] * 4) == [1, 1, 0, 0]
    assert scores("numeric", ["5", "5"], solution=["5", None]) == [1, None]
    assert scores("numeric", ["5", "#### 5"], ["5"] * 2, {"marked": True}) == [0, 1]
    with pytest.raises(UserError, match=r"reward.options.exact.column: 'soluton' is no column .* did you mean 'solution'"):
        scores("exact", ["5"], options={"column": "soluton"}, solution=["5"])


def test_maths() -> None:
    pytest.importorskip("math_verify")
    assert scores("maths", [r"$\frac{2}{4}$", r"\boxed{0.5}", "1/3"], solution=["1/2"] * 3) == [1, 1, 0]


def test_form_and_length() -> None:
    assert scores("regex", ["<think>a\nb</think> c", "c", "<think></think>"]) == [1, 0, 0]
    assert scores("regex", ["a 12 b", "ab"], options={"pattern": r"\d+", "whole": False}) == [1, 0]
    assert scores("length", ["", "a", "a b", "a b c d", "a b c d e f"], options={"at_least": 2, "at_most": 4}) == [
        0,
        0.5,
        1,
        1,
        0.5,
    ]


def test_json_schema() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    answers = ['{"a": 1}', '```json\n{"a": 2}\n```', '{"a": "x"}', "no"]
    assert scores("json_schema", answers, options={"schema": schema, "valid": 0.25}) == [1, 1, 0.25, 0]
    assert scores("json_schema", ['{"a": 1}', "1"], schema=[json.dumps(schema), None]) == [1, None]


TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]
ESCAPES = {
    "memory": "x = bytearray(2**31)\ndef add(a, b): return a + b",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT))\ndef add(a, b): return a + b",
    "process": "import subprocess\nsubprocess.run(['true'])\ndef add(a, b): return a + b",
    "fork": "import os\nos.fork()\ndef add(a, b): return a + b",
    "library": "import ctypes\nctypes.CDLL(None)\ndef add(a, b): return a + b",
    "file": "open('PLACE', 'w').write('x')\ndef add(a, b): return a + b",
    "environment": "import os\nassert os.environ['SECRET_OF_MINE']\ndef add(a, b): return a + b",
    "early end": "import os\nprint('0' * 32 + ' 2')\nos._exit(0)",
    "caught": "import sys\nsys.exit(0)",
}


def test_code_passes_its_tests() -> None:
    answers = [
        "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", "def add(a, b): return int(a) + int(b)",
        "def add(", "def add(a, b): return a + b",
    ]  # fmt: skip
    tests = [TESTS, TESTS, TESTS, None]
    assert scores("code", answers, tests=tests) == [1, 0.5, 0, None]
    assert scores("code", answers, options={"all_or_nothing": True}, tests=["\n".join(TESTS)] * 4) == [1, 0, 0, 1]


def test_code_is_held_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "s")
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    try:
        texts = {
            name: text.replace("PLACE", str(tmp_path / "out")).replace("PORT", str(server.server_port))
            for name, text in ESCAPES.items()
        }
        found = scores("code", list(texts.values()), tests=[TESTS] * len(texts))
    finally:
        server.server_close()
    assert dict(zip(texts, found, strict=True)) == dict.fromkeys(texts, 0.0) and not (tmp_path / "out").exists()


def test_code_that_does_not_end_is_ended() -> None:
    began = time.monotonic()
    loops = ["while True: pass", "import time\ntime.sleep(60)"]
    assert scores("code", loops, options={"seconds": 1.0}, tests=[TESTS] * 2) == [0, 0]
    assert time.monotonic() - began < 30


def test_a_classifier_of_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from posttrain.models.builtin import builtin_directory

    tokenizer: Any = AutoTokenizer.from_pretrained(builtin_directory("tiny")[0])
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config.num_labels = 2
    model: Any = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    answers = ["a", "a much longer answer", "b"]
    found = scores("classifier", answers, options={"path": str(tmp_path / "rm"), "label": 1, "batch_size": 2})
    with torch.no_grad():
        alone = [
            model(torch.tensor([tokenizer.encode("p" + each, add_special_tokens=False)])).logits[0, 1].item() for each in answers
        ]
    assert found == pytest.approx(alone, abs=1e-5) and len(set(found)) == 3
    reads = LlamaForSequenceClassification.forward

    def short(self: Any, input_ids: Any, **given: Any) -> Any:
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return reads(self, input_ids, **given)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", short)
    parts = scores("classifier", answers, options={"path": str(tmp_path / "rm"), "label": 1, "batch_size": 3})
    assert parts == pytest.approx(alone, abs=1e-5)
    with pytest.raises(UserError, match=r"reward.options.classifier.path: nowhere is no directory of a classifier"):
        load_function("classifier", "reward.function", {"classifier": {"path": "nowhere"}})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, list[Any]]]:
    """A judge that gives as many points as the answer has letters, says 503 at first, and writes down what it was asked."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("POSTTRAIN_JUDGE_KEY", "k1")
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            said = "no idea" if "odd" in str(body) else f"Fine.\nScore: {len(body['messages'][0]['content'].split('|')[1])}"
            text = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(503 if len(asked) == 1 else 200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_again_kept_and_named_where_it_is_away(endpoint: tuple[str, list[Any]]) -> None:
    url, asked = endpoint
    options = {"url": url, "model": "m", "prompt": "{prompt}|{answer}|{reference}", "at_once": 1}
    assert scores("judge", ["aaa", "odd", "{prompt}"], ["r"] * 3, options) == [0.3, None, 0.8]
    assert len(asked) == 4 and asked[0][0] == "/v1/chat/completions" and asked[0][1] == "Bearer k1"
    assert asked[0][2] == {"model": "m", "messages": [{"role": "user", "content": "p|aaa|r"}], "temperature": 0}
    assert scores("judge", ["aaa", "odd", "{prompt}"], ["r"] * 3, options) == [0.3, None, 0.8] and len(asked) == 4
    away = {**options, "url": "http://127.0.0.1:9/v1", "tries": 1}
    with pytest.raises(
        BeforeStep, match=r"reward function judge raised OSError: the judge at http://127.0.0.1:9/v1 does not answer"
    ):
        scores("judge", ["aaa"], ["r"], away)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("exakt", {}, "reward.function: there is no reward 'exakt' - did you mean 'exact'"),
        ("length", {"at_mst": 3}, r"reward.options.length.at_mst: length has at_least, at_most - did you mean 'at_most'"),
        ("length", {"at_most": 0}, "reward.options.length: at_least=0 and at_most=0"),
        ("length", {"at_most": "x"}, "reward.options.length: "),
        ("regex", {"pattern": "("}, "reward.options.regex.pattern: "),
        ("judge", {}, "reward.options.judge: give its url and model"),
    ],
)
def test_bad_options_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_function(name, "reward.function", {name: options})
    assert "\n" not in str(caught.value)


def test_the_right_answer_is_looked_for_row_by_row() -> None:
    """So what a row earns does not depend on the rows that are asked about beside it."""
    function = load_function("exact", "reward.function").of_rows({"solution", "answer"}, True, "reward.function")
    columns = {"solution": ["a", None, None], "answer": ["x", "b", None]}
    assert function(["p"] * 3, ["a", "b", "c"], ["", "", "c"], columns).tolist() == [1.0, 1.0, 1.0]
    assert function(["p"], ["c"], ["c"], {}).tolist() == [1.0]


@pytest.mark.parametrize("name", ["exact", "numeric", "f1", "rouge_l"])
def test_rows_without_any_right_answer_are_refused(name: str) -> None:
    function = load_function(name, "reward.function")
    with pytest.raises(UserError, match=rf"^reward.function: {name} has nothing to compare with: no row .*columns are id, task"):
        function.of_rows({"task", "id"}, False, "reward.function")
    assert function.of_rows({"task"}, True, "reward.function") and function.of_rows({"label"}, False, "reward.function")
