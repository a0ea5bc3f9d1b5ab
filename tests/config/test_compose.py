"""What a user types becomes the config it says, or one line that names the field."""

from pathlib import Path

import pytest

from posttrain.config.compose import compose_run, expand, show, validate
from posttrain.config.paths import root
from posttrain.config.schema import MixedSource
from posttrain.data.selection import sources_of
from posttrain.errors import UserError
from posttrain.runs.identity import digest

STAGES = ("cpt", "sft", "dpo")
GROUPS = ("model", "peft", "quant", "data", "optim", "train", "experiment")
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((root("configs") / group).glob("*.yaml"))]


MIX = ["data=mix", "data.sources.a.path=a.jsonl", "data.sources.a.share=0.3", "data.sources.b.path=b.jsonl"]


@pytest.mark.parametrize("form", ["+peft=qlora", "peft=qlora", "++peft=qlora"])
def test_a_method_is_chosen_with_and_without_plus(form: str) -> None:
    assert digest(compose_run("sft", [form])) == digest(compose_run("sft", ["+peft=qlora"]))


@pytest.mark.parametrize("form", ["peft=none", "peft=null", "~peft"])
def test_no_method_in_any_form(form: str) -> None:
    assert compose_run("sft", [form]) == compose_run("sft", [])


def test_qlora_brings_its_quantization_and_optimizer_and_the_user_can_differ() -> None:
    config = compose_run("sft", ["peft=qlora"])
    assert config["quant"]["method"] == "nf4" and config["optim"]["name"] == "paged_adamw_8bit"
    for words in (["quant=none", "+peft=qlora", "optim=adamw"], ["+peft=qlora", "optim=adamw", "quant=none"]):
        config = compose_run("sft", words)
        assert config["quant"]["method"] == "none" and config["optim"]["name"] == "adamw"


def test_the_learning_rate_follows_stage_and_method() -> None:
    assert compose_run("sft", [])["optim"]["lr"] == pytest.approx(2e-5)
    assert compose_run("sft", ["peft=lora"])["optim"]["lr"] == pytest.approx(2e-4)
    assert compose_run("dpo", ["peft=qlora"])["optim"]["lr"] == pytest.approx(5e-6)
    assert compose_run("dpo", ["peft=qlora", "optim.lr=1e-3"])["optim"]["lr"] == 1e-3


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(stage: str, group: str, option: str) -> None:
    words = [f"{group}={option}"]
    words += ["data.path=x.jsonl"] if option == "file" else []
    words += ["data.sources.a.path=x.jsonl", "data.sources.a.share=1"] if option == "mix" else []
    words += ["peft=lora"] if option in ("nf4", "int8") else []
    assert compose_run(stage, words)["stage"] == stage


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+peftt=qlora"], "unknown key 'peftt' - did you mean 'peft'?"),
        (["optim.lrr=1"], "unknown key 'optim.lrr' - did you mean 'optim.lr'?"),
        (["lr=1"], "unknown key 'lr' - did you mean 'optim.lr'?"),
        (["peft=lora", "peft.r=abc"], "peft.r: input should be a valid integer"),
        (["peft=lora", "peft.r=0"], "peft.r: input should be greater than or equal to 1"),
        (["peft=qlora", "quant.dense_layers=-1"], "dense_layers: input should be 'auto' or greater than or equal to 0 (got -1)"),
        (
            ["train.gradient_checkpointing=some"],
            "train.gradient_checkpointing: input should be 'auto' or a valid boolean or a valid integer (got 'some')",
        ),
        (["peft=lora", "peft.init=lora_gaa"], "or 'loftq' - did you mean 'lora_ga'? (got 'lora_gaa')"),
        (["peft=qlorra"], "peft: there is no 'qlorra' - did you mean 'qlora'?"),
        (["peft.r=4"], "peft.r does not belong to the chosen peft; it needs +peft=lora"),
        (["quant=nf4"], "quant=nf4 cannot be trained in full; add +peft=qlora"),
        (["optim.lr=-1"], "optim.lr: input should be greater than 0"),
        (["train.max_steps=2.5"], "train.max_steps: "),
        (["train.max_steps=0"], "train.max_steps: "),
        (["optim.schedule=cosin"], "optim.schedule: "),
        (["data=mix"], "data.sources: there is none; give data.sources.NAME.path=..."),
        ([*MIX, "data.sources.b.share=0.5"], "data.sources: the shares sum to 0.8; they are shares of all tokens"),
        ([*MIX, "data.sources.b.shar=0.5"], "unknown key 'data.sources.b.shar' - did you mean 'share'?"),
        ([*MIX, "data.sources.b.split=x"], "data.sources.b.share has no value; give data.sources.b.share=..."),
        ([*MIX, "data.sources.b.share=0.7", "data.alpha=0.5"], "data.alpha: every one of data.sources has a share"),
        (["data.alpha=1.5"], "data.alpha: input should be"),
        (["data=file"], "data.path has no value; give data.path=..."),
        (["nonsense"], "'nonsense' is no override: write key=value"),
        (["data.path=[a"], "is no override"),
        (["train.keep_best=eval/loss"], "train.keep_best: evaluations are compared, and there is none during training"),
        (["train.early_stopping.patience=2"], "train.early_stopping.patience: evaluations are compared"),
        (["train.early_stopping.metric=eval/loss"], "train.early_stopping: give its patience too"),
        (["train.eval_steps=5", "train.keep_best=eval/odd"], "train.early_stopping.direction=lower or higher"),
        (["train.eval_steps=5", "train.keep_best=eval/los"], "did you mean 'eval/loss'?"),
        (["train.eval_steps=5", "train.keep_best=eval/loss", "train.early_stopping.metric=eval/x"], "one metric decides"),
        (["train.eval_steps=5", "train.keep_best=general/loss"], "train.keep_best: no evaluation of sft measures 'general/loss'"),
        (
            ["train.eval_steps=5", "train.keep_best=forgetting/percent"],
            "train.keep_best: no evaluation of sft measures",
        ),
        (
            ["train.eval_steps=5", "train.early_stopping.patience=1", "train.early_stopping.metric=train/loss"],
            "train.early_stopping.metric: no evaluation of sft measures 'train/loss'",
        ),
        (
            ["train.eval_steps=5", "train.keep_best=answers/exact"],
            "train.keep_best: no evaluation of sft measures 'answers",
        ),
        (
            [
                "train.eval_steps=5",
                "train.keep_best=answers/rouge",
                "eval.generate.metrics=[rouge_l,a:exact]",
                "eval.generate.prompts=2",
            ],
            "did you mean 'answers/rouge_l'?",
        ),
        (
            ["train.eval_steps=5", "train.keep_best=eval/loss", "data.eval_rows=0"],
            "eval/loss is of held-out rows, and there is none; say data.eval_rows=64",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_run("sft", words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a=b.jsonl", "with space.jsonl", "org/set:train[:1%]", "it's.jsonl", "s3://b/k?x=1", "ü.jsonl"])
def test_odd_paths_need_no_quotes(path: str) -> None:
    assert compose_run("sft", [f"data.path={path}"])["data"]["path"] == path


def test_a_source_says_what_it_does_not_say_otherwise() -> None:
    words = [*MIX, "data.sources.b.share=0.7", "data.sources.b.split=test", "data.max_rows=5"]
    data = validate(compose_run("sft", words)).data
    a, b = sources_of(data).values()
    assert (a.path, a.split, a.shape, a.max_rows) == ("a.jsonl", "train", "auto", None)
    assert isinstance(b, MixedSource)
    assert (b.path, b.split, b.share) == ("b.jsonl", "test", 0.7)
    half = validate(compose_run("cpt", ["data.alpha=0.4", "data.general.path=g.txt"])).data
    assert [(name, source.path) for name, source in sources_of(half).items()] == [
        ("domain", "builtin:reference"),
        ("general", "g.txt"),
    ]
    assert list(sources_of(validate(compose_run("cpt", ["data.alpha=1"])).data)) == ["data"]


def test_a_users_directory_adds_and_shadows(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.yaml").write_text("defaults:\n  - lora\n  - _self_\nr: 5\n")
    (tmp_path / "peft" / "lora.yaml").write_text((root("configs") / "peft" / "lora.yaml").read_text().replace("r: 16", "r: 3"))
    assert compose_run("sft", ["peft=mine"], tmp_path)["peft"]["r"] == 5
    assert compose_run("sft", ["peft=lora"], tmp_path)["peft"]["r"] == 3
    assert compose_run("sft", ["peft=lora"])["peft"]["r"] == 16
    with pytest.raises(UserError, match="is no directory"):
        compose_run("sft", [], tmp_path / "absent")


def test_an_experiment_beats_groups_and_the_user_beats_it(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /peft: qlora\n  - override /quant: none\noptim:\n  lr: 0.5\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose_run("sft", ["experiment=mine"], tmp_path)
    assert (config["peft"]["method"], config["quant"]["method"], config["optim"]["lr"]) == ("qlora", "none", 0.5)
    assert compose_run("sft", ["experiment=mine", "quant=nf4"], tmp_path)["quant"]["method"] == "nf4"


def test_a_sweep_is_every_combination() -> None:
    jobs = expand("sft", ["+peft=qlora", "peft.r=4,8", "peft.alpha=16,32"])
    swept = [[word for word in job if word.startswith(("peft.r=", "peft.alpha="))] for job in jobs]
    assert swept == [[f"peft.r={r}", f"peft.alpha={a}"] for r in (4, 8) for a in (16, 32)]


def test_show_prints_the_config_and_how_it_came_about() -> None:
    assert "method: qlora" in show("sft", ["+peft=qlora"], None, "job", None)
    assert "peft/qlora.yaml" in show("sft", ["+peft=qlora"], None, None, "defaults")
    with pytest.raises(UserError, match="there is no 'jobs' - did you mean 'job'"):
        show("sft", [], None, "jobs", None)
