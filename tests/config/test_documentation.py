"""docs/configuration.md names every key there is, and no other."""

import re

import pytest

from posttrain.config.compose import compose_run
from posttrain.config.paths import root
from posttrain.runs.identity import flatten
from posttrain.stages.spec import stages

PAGE = root("configs").parent / "docs" / "configuration.md"
GIVEN = {  # what a stage cannot do without
    "ppo": ["init_reward=runs/rm/RUN"],
    "dreambooth": ["data.instance_dir=photos", "data.instance_prompt=a sks dog", "data.class_prompt=a dog"],
}
FREE = ("eval.sets.", "data.sources.", "data.columns.")  # names that the user chooses


@pytest.mark.skipif(not PAGE.exists(), reason="runs from a checkout only")
def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    table = PAGE.read_text().split("## Keys")[1].split("## Environment")[0]
    documented = {
        key for line in table.splitlines() for key in re.findall(r"`([\w.]+)`", line.split("|")[1] if "|" in line else "")
    }
    known = {"stage"}
    for stage in stages():
        given = GIVEN.get(stage, [])
        known |= set(flatten(compose_run(stage, ["peft=qlora", *given])))
    known = {key for key in known if not key.startswith(FREE)} | {"eval.sets"}
    assert documented == known - {"stage"}
