"""YAML of others: what aliases stand for is counted before it is made."""

from pathlib import Path

import pytest
import yaml

from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.launch.recipe import load_recipe
from posttrain.runs.directory import read_config
from posttrain.runs.yaml_files import NODES, check_aliases, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(("text", "said"), [(BOMB, "more than 100,000 values"), ("a: &a [*a]\n", "a value within itself")])
def test_a_bomb_of_aliases_is_refused_wherever_yaml_is_read(text: str, said: str, tmp_path: Path) -> None:
    """10 ** 10 values in 500 bytes: a recipe, a run's config, an experiment."""
    for name in ("recipe.yaml", "config.yaml"):
        (tmp_path / name).write_text(text)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "e.yaml").write_text("# @package _global_\n" + text)
    with pytest.raises(UserError, match=said):
        load_recipe(str(tmp_path / "recipe.yaml"), [])
    with pytest.raises(UserError, match=rf"config.yaml cannot be read \(.*{said}"):
        read_config(tmp_path)
    with pytest.raises(UserError, match=rf"{said}"):
        compose_run("sft", ["+experiment=e"], tmp_path)


def test_an_experiment_that_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "deep.yaml").write_text("{" * 5000)
    with pytest.raises(UserError, match=r"--config-dir: .*deep.yaml: it is nested too deep"):
        compose_run("sft", ["+experiment=deep"], tmp_path)


def test_aliases_as_people_write_them_are_read(tmp_path: Path) -> None:
    """Up to the limit exactly: the list, its items, and each alias written out."""
    file = tmp_path / "a.yaml"
    file.write_text("common: &c {lr: 1}\nuse: {<<: *c, r: 2}\n")
    assert read_yaml(file) == {"common": {"lr": 1}, "use": {"lr": 1, "r": 2}}
    check_aliases(tmp_path)
    half = (NODES - 2) // 2  # a list of two: itself, a list with its items, and the alias
    file.write_text(f"- &a [{'1, ' * (half - 1)}]\n- *a\n")
    assert len(read_yaml(file)) == 2
    file.write_text(f"- &a [{'1, ' * half}]\n- *a\n")
    with pytest.raises(yaml.YAMLError, match="more than"):
        read_yaml(file)
    (tmp_path / "broken.yaml").write_text("a: [*b &")
    (tmp_path / "a.yaml").unlink()
    check_aliases(tmp_path)  # what is no YAML is for its reader to tell
