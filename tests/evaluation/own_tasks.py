"""Two tasks for lm-eval, so that nothing is downloaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
test_split: test
fewshot_split: train
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_target: "{{answer}}"
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc}]
"""
WRITTEN = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "7"
generation_kwargs: {until: ["END"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
"""


@contextmanager
def own_tasks(folder: Path, *filters: str) -> Iterator[Path]:
    """own_choice (yes or no) and own_written, whose answer the filters read, of six rows; `folder` is what to include. Inside,
    those that lm-eval ships, which it takes seconds to list, are left out. Skips where lm-eval is missing."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval: pip install 'posttrain[eval]'")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"Is {i} more than 2?", "answer": "no" if i < 3 else "yes"}) + "\n" for i in range(6))
    )
    written = WRITTEN + "".join(f"  - {each}\n" for each in filters)
    for name, body in (("own_choice", CHOICE), ("own_written", written)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows) + body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
        yield folder
