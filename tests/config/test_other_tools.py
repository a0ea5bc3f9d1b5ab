"""Words of other tools are known: what they are called here is said, and exists."""

import re

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config.complaints import unknown_key
from posttrain.config.compose import compose_run
from posttrain.config.interfaces import METHODS
from posttrain.config.other_tools import meaning, option_meaning, words
from posttrain.config.paths import root
from posttrain.data.collate import BatchSampler
from posttrain.launch.worker import PATIENCE
from posttrain.runs.identity import flatten
from posttrain.runs.yaml_files import read_yaml

OPEN = ("data.columns.", "data.sources.", "dpo.options.")  # whose names are the user's, or a loss's
GIVEN = {"ppo": ["reward.function=length"]}


@pytest.fixture(scope="module")
def keys() -> set[str]:
    found: set[str] = set()
    for stage in ("sft", "rm", "ppo", "dpo"):
        found |= set(flatten(compose_run(stage, GIVEN.get(stage, []))))
    return found | {f"peft.{name}" for method in METHODS.all().values() for name in method.model_fields}


def test_every_target_is_a_key_or_a_group_and_its_values_are_options(keys: set[str]) -> None:
    groups = {path.name: {file.stem for file in path.glob("*.yaml")} for path in root("configs").iterdir() if path.is_dir()}
    for name, word in words().items():
        assert word.key in keys | set(groups) or word.key.startswith(OPEN) or (word.says and not word.key), name
        if word.key in groups and word.values:
            assert set(word.values.values()) <= groups[word.key], name
        for named in re.findall(r"\b(?:model|data|train|optim|peft|reward|dpo|ppo|rollout|track)(?:\.[a-z]\w*)+", word.says):
            assert named in keys or named.startswith(OPEN), (name, named)


def test_values_are_taken_by_the_schema() -> None:
    said = {(word.key, value) for word in words().values() for value in (word.values or {}).values() if "." in word.key}
    said = {(key, value) for key, value in said if key.split(".")[0] in ("model", "optim", "train", "data")}
    for turn in range(max(sum(key == each for each, _ in said) for key, _ in said)):  # a value of each key at a time
        now = {key: sorted((value for each, value in said if each == key), key=str) for key, _ in said}
        lines = [f"{key}={'null' if found[turn] is None else found[turn]}" for key, found in now.items() if turn < len(found)]
        assert compose_run("sft", ["train.eval_steps=10", "+peft=lora", *lines])  # what keep_best and offload=layers need


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("learning_rate", "learning_rate is optim.lr here"),
        ("optim.learning_rate", "learning_rate is optim.lr here"),
        ("batch_size", "batch_size is train.batch_size here"),
        ("lora_r", "lora_r is peft.r here"),
        ("output_dir", "output_dir is run.dir here"),
        ("num_train_epochs", "num_train_epochs is train.epochs here"),
        ("per_device_train_batch_size", "per_device_train_batch_size is train.batch_size here"),
        ("train.deepspeed", "deepspeed is train.fsdp here; train.fsdp=true shards over train.processes"),
        ("gradient_checkpointing_kwargs", "gradient_checkpointing_kwargs has no like here: checkpoints are always"),
    ],
)
def test_an_error_names_ours(key: str, said: str) -> None:
    assert f"unknown key '{key}' - {said}" in unknown_key(key, ["optim.lr", "train.seed"])


def test_the_option_of_another_tool_is_named_in_one_line() -> None:
    for words_ in (["--learning-rate", "1e-4"], ["--learning_rate=1e-4"]):
        found = CliRunner().invoke(app, ["sft", *words_])
        assert found.exit_code == 2
        assert found.output.strip() == f"error: {words_[0]}: learning_rate is optim.lr here; say optim.lr=1e-4"
    assert option_meaning("--optim.lr", "1e-4") == "--optim.lr: settings are words without dashes: optim.lr=1e-4"
    assert option_meaning("--nonsense") == "" == meaning("nonsense")
    assert CliRunner().invoke(app, ["sft", "--nonsense"]).exit_code == 2


NF4 = read_yaml(root("configs") / "quant" / "nf4.yaml")
# a reason that is a promise -> what it says, and whether that is so
PROMISES = {
    "bnb_4bit_compute_dtype": ("quant.compute_dtype, bfloat16 by default", lambda: NF4["compute_dtype"] == "bfloat16"),
    "use_bnb_nested_quant": ("quant.double_quant, true by default", lambda: NF4["double_quant"] is True),
    "double_quantization": ("quant.double_quant, true by default", lambda: NF4["double_quant"] is True),
    "dataloader_drop_last": ("the last step of a run may be smaller", lambda: _steps_of(7, 2) == [2, 2, 2, 1]),
    "disable_shuffling": ("random order, which train.seed decides", lambda: _drawn(1) == _drawn(1) != _drawn(2)),
    "ddp_timeout": ("six hours", lambda: PATIENCE.total_seconds() == 6 * 3600),
    "log_completions": ("eval.generate.prompts", lambda: compose_run("sft", [])["eval"]["generate"]["prompts"] == 0),
}


def _steps_of(units: int, batch: int) -> list[int]:
    order = BatchSampler.shuffled(units, batch, 1, 1, 0, units)
    assert sorted(unit for step in range(order.num_steps) for unit in order.step(step)) == list(range(units)), "each is drawn"
    return [len(order.step(step)) for step in range(order.num_steps)]


def _drawn(seed: int) -> list[int]:
    return BatchSampler.shuffled(100, 2, 1, 1, seed, 100).drawn.tolist()


@pytest.mark.parametrize("word", PROMISES)
def test_a_reason_is_so(word: str) -> None:
    said, is_so = PROMISES[word]
    assert said in words()[word].says and is_so()


def test_what_can_be_ordered_otherwise_is_not_said_to_be_always_random() -> None:
    assert "curriculum" in compose_run("sft", []) and "curriculum.by" in words()["disable_shuffling"].says
