"""What another model says of an answer, asked over an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from posttrain.errors import UserError
from posttrain.runs.cache import cached_json
from posttrain.runs.cache_place import cache_root

KEY = "POSTTRAIN_JUDGE_KEY"
QUESTION = (
    "Rate the answer from 0 (useless) to 10 (perfect). Say one line of reasons, then 'Score:' and the number.\n\n"
    "Question:\n{prompt}\n\nAnswer:\n{answer}\n"
)
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


class Judge:
    """The number that a judge gives, over `best`; what it has said is kept in the cache, by question and model.

    $POSTTRAIN_JUDGE_KEY is sent as the key, if it is set.

    Args:
        url: of the endpoint, up to /v1. model: its name there.
        prompt: what is asked, with {prompt}, {answer} and {reference}.
        pattern: whose first group, where it is found last, is the number; None of an answer of the judge's without it.
        best: the number that is worth 1.
        tries: how often one question is asked before the run ends; with a pause that doubles.
        timeout: seconds for one of them. at_once: questions at the same time.
    """

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        prompt: str = QUESTION,
        pattern: str = r"[Ss]core:\s*\**\s*(-?\d+(?:\.\d+)?)",
        best: float = 10.0,
        tries: int = 4,
        timeout: float = 60.0,
        at_once: int = 8,
    ) -> None:
        if not url or not model:
            raise UserError("reward.options.judge: give its url and model, as reward.options.judge.url=http://localhost:8000/v1")
        self.url, self.model, self.prompt, self.best = url.rstrip("/"), model, prompt, best
        self.pattern, self.tries, self.timeout, self.at_once = re.compile(pattern), tries, timeout, at_once

    def __call__(self, prompts: list[str], answers: list[str], references: list[str]) -> list[float | None]:
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self._score, prompts, answers, references))

    def _score(self, prompt: str, answer: str, reference: str) -> float | None:
        fields = {"{prompt}": prompt, "{answer}": answer, "{reference}": reference}
        question = re.sub("|".join(map(re.escape, fields)), lambda found: fields[found[0]], self.prompt)
        asked = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        named = hashlib.sha256(json.dumps([self.url, asked], sort_keys=True).encode()).hexdigest()
        said = cached_json(cache_root() / "judged" / f"{named}.json", lambda: self._asked(asked))
        numbers = self.pattern.findall(said)
        return float(numbers[-1]) / self.best if numbers else None

    def _asked(self, asked: dict[str, Any]) -> str:
        """Raises OSError where the endpoint is away, or refuses."""
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        )
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(asked).encode(), headers)
        why = ""
        for pause in [2.0**i / 2 for i in range(self.tries)]:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                if error.code not in _AGAIN:
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            time.sleep(pause)
        raise OSError(f"the judge at {self.url} does not answer ({why})")


REWARD = Judge
