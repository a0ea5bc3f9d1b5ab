"""docs/configuration.md is what its generator makes, names every key there is and explains it."""

import re
from pathlib import Path

import pytest

from configuration_page import PAGE, STAGES, TEMPLATE, key_tables, page, said
from posttrain.config.compose import compose_run
from posttrain.config.paths import root
from posttrain.runs.identity import flatten
from yaml_comments import explained, header

GIVEN = {  # what a stage cannot do without
    "ppo": ["init_reward=runs/rm/RUN"],
    "dreambooth": ["data.instance_dir=photos", "data.instance_prompt=a sks dog", "data.class_prompt=a dog"],
}
FREE = ("eval.sets.", "data.sources.", "data.columns.")  # names that the user chooses
METHODS = sorted(path.stem for path in (root("configs") / "peft").glob("*.yaml"))
SECTIONED = """# What it is for,
# in two lines.
defaults:
  - base
  - _self_
plain: 1            # a number
section:            # of the section
  inner: [1, 2]     # goes on
                    # in the next line
  # not of inner, but of what follows
  bare: null
"""


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """Key -> the other cells of its row."""
    found = {}
    for line in key_tables().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\\\)\|", line.strip("|"))]
        if match := re.fullmatch(r"`([\w.]+)`", cells[0]):
            found[match[1]] = cells[1:]
    return found


def test_the_page_is_what_the_generator_makes() -> None:
    assert page() == PAGE.read_text(), "run `make docs`"


def test_every_key_is_documented_and_every_documented_key_exists(rows: dict[str, list[str]]) -> None:
    known = set()
    for stage in STAGES:
        known |= set(flatten(compose_run(stage, GIVEN.get(stage, []))))
    for method in METHODS:
        known |= set(flatten(compose_run("sft", [f"peft={method}"])))
    for quant in ("nf4", "int8"):
        known |= set(flatten(compose_run("sft", ["peft=lora", f"quant={quant}"])))
    known = {key for key in known if not key.startswith(FREE)} | {"eval.sets"}
    assert set(rows) == known - {"stage"}


def test_every_key_has_a_default_and_a_meaning(rows: dict[str, list[str]]) -> None:
    assert [key for key, cells in rows.items() if not all((cells[-3], cells[-1]))] == []


def test_rows_say_what_the_schema_and_the_files_say(rows: dict[str, list[str]]) -> None:
    assert rows["dpo.label_smoothing"][:2] == ["`null`", "number ≥ 0 and < 0.5 or `null`"]
    assert rows["full_lr"][0].startswith("`2e-5`; `1e-5` (rm); `1e-6` (ppo)")
    assert rows["optim.lr"][0] == "computed"
    assert rows["train.max_steps"][1] == "integer ≥ 1 or `null`"
    assert rows["peft.alpha"][1] == "`32`; `64` (gralora); `16` (loha, lokr, pissa, rslora)"
    assert rows["curriculum.by"][1] == "`length`, `perplexity` or `null`"


def test_comments_belong_to_the_key_before_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("bare: 2  # told below\nother: 3  # of base\n")
    (tmp_path / "top.yaml").write_text(SECTIONED.replace("  bare: null\n", "  bare: null\nbare: 5\n"))
    found = {key: each.comment for key, each in explained(tmp_path / "top.yaml").items()}
    assert found == {
        "plain": "a number",
        "section": "of the section",
        "section.inner": "goes on in the next line",
        "section.bare": "",
        "bare": "",
    }
    assert header(tmp_path / "top.yaml") == "What it is for, in two lines."
    whole = said(tmp_path / "top.yaml")
    assert (whole["bare"].value, whole["bare"].comment) == ("5", "told below")
    assert whole["other"].comment == "of base"


def test_the_examples_of_own_files_compose(tmp_path: Path) -> None:
    examples = re.findall(
        r"`mine/([\w/]+\.yaml)`:\n\n```yaml\n(.*?)```\n\n    posttrain sft --config-dir mine (\S+)", TEMPLATE.read_text(), re.S
    )
    assert len(examples) == 2
    for name, text, _ in examples:
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
    wide, short = (compose_run("sft", [word], tmp_path) for _, _, word in examples)
    assert (wide["peft"]["r"], wide["peft"]["targets"]) == (64, "all-linear")
    assert (short["peft"]["method"], short["train"]["max_steps"], short["optim"]["lr"]) == ("qlora", 20, 1e-4)
