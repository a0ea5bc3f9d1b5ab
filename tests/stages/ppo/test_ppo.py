"""PPO on a tiny model: exactness at the first update, resume, roles, a bandit's known optimum, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import posttrain
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import RunError, UserError
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.actor_critic import ActorCritic
from posttrain.models.language.packed_lm import PackedLM
from posttrain.rewards import combined, load_function
from posttrain.stages.ppo.summary import lines_of_method
from posttrain.stages.ppo.training import PpoTraining

TINY = (
    "model=tiny",
    "train.max_steps=2",
    "train.batch_size=2",
    "data.max_rows=60",
    "data.eval_rows=4",
    "eval.rows=4",
    "rollout.max_new_tokens=12",
    "train.grad_accum=4",
    "ppo.minibatches=2",
)
LORA = ("+peft=lora", "optim.lr=0.01")
SMALL = (
    "model=tiny",
    "+peft=lora",
    "train.max_steps=2",
    "train.batch_size=2",
    "data.max_rows=40",
    "data.eval_rows=8",
    "eval.rows=4",
    "optim.lr=0.01",
)
RULES = """
import math
def short(prompts, responses): return [-len(text) / 10 for text in responses]
def same(prompts, responses, references): return [float(a[:1] == b[:1]) for a, b in zip(responses, references)]
def letter(prompts, responses):
    return [{"a": 1.0, "b": -1.0, "c": 0.0, "d": 0.5, "e": -0.5, "f": 0.8}.get(text, 0.0) for text in responses]
def broken(prompts, responses): raise KeyError("no such word")
def nan(prompts, responses): return [math.nan for _ in responses]
def few(prompts, responses): return [1.0]
"""


@pytest.fixture(autouse=True)
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ppo_rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("ppo_rules", None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft, and rm on top of it."""
    root = tmp_path_factory.mktemp("runs")
    posttrain.run("sft", *SMALL, f"run.dir={root / 'sft'}")
    posttrain.run("rm", *SMALL, f"init={root / 'sft'}", f"run.dir={root / 'rm'}")
    return root


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_roles_take_turns_on_one_base(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    inner = PpoTraining.updates

    def spy(self: PpoTraining, step: int) -> Any:
        updates, module = inner(self, step), self.session.module
        update = next(updates, None)
        while update is not None:
            if step == 0 and update.batches and "old" not in seen:
                batch = update.batches[0]
                seen["old"] = batch.extra["old"]
                seen["new"] = module(batch, "policy").detach()
                seen["reference"] = module(batch, "reference").detach()
                seen["value"] = module(batch, "value").detach()
                seen["score"] = module(batch, "reward").detach()
                seen["batch"], seen["module"] = batch, module
            outcome = yield update
            try:
                update = updates.send(outcome)
            except StopIteration:
                update = None

    monkeypatch.setattr(PpoTraining, "updates", spy)
    found = posttrain.run(
        "ppo", *TINY, *LORA, "train.max_steps=1", f"init={runs / 'sft'}", f"init_reward={runs / 'rm'}", "run.dir=ppo"
    )
    # at the first update the ratio is exactly 1 and the KL exactly 0
    assert torch.equal(seen["new"], seen["old"]) and torch.equal(seen["reference"], seen["old"])
    assert {p["role"] for p in found["parents"]} == {"init", "reward"}
    module, batch = seen["module"], seen["batch"]
    assert isinstance(module, ActorCritic) and module.adapters["value"] == ["reward", "value"] and module.reference is None
    scorers: Any = module.scorers
    # each role against the run it came from, loaded by peft
    base = AutoModelForCausalLM.from_pretrained(builtin_directory("tiny")[0], dtype=torch.bfloat16)
    alone = PackedLM(PeftModel.from_pretrained(base, str(runs / "sft" / "adapter")), "documents").eval()
    with torch.no_grad():
        assert (alone(batch) - seen["reference"]).abs().max() < 0.05
    head = load_file(runs / "rm" / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(scorers["reward"].score.weight, head) and not scorers["reward"].score.weight.requires_grad
    # the reward stays what it was; policy, value and the value's head learn
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert [sum(kind in name for name in trained) for kind in (".default.", ".value.")] == [28, 28 + 1] and len(trained) == 57
    assert "scorers.value.score.weight" in trained
    assert torch.equal(scorers["reward"].score.weight, head)
    assert not torch.equal(scorers["value"].score.weight, head)
    with torch.no_grad():
        assert torch.equal(module(batch, "reward"), seen["score"]) and torch.equal(module(batch, "reference"), seen["reference"])
        assert not torch.equal(module(batch, "policy"), seen["new"]) and not torch.equal(module(batch, "value"), seen["value"])


def test_what_a_run_says_and_leaves(runs: Path, tmp_path: Path) -> None:
    found = posttrain.run("ppo", *TINY, *LORA, f"init={runs / 'sft'}", f"init_reward={runs / 'rm'}", "run.dir=ppo")
    first, *steps = lines(tmp_path / "ppo")
    assert first["eval/kl"] == 0 and "eval/reward" in first
    for name in ("reward", "kl", "entropy", "clip_fraction", "explained_variance", "length", "reward_per_token", "value_loss",
                 "rollout_tokens_per_second", "update_tokens_per_second", "kl_coef", "sampling_gap"):  # fmt: skip
        assert all(f"train/{name}" in line for line in steps[:2]), name
    assert steps[0]["train/kl"] == 0 and steps[0]["train/sampling_gap"] < 0.02
    assert {"eval/reward", "eval/reward_before", "general/loss"} <= set(found["metrics"])
    samples = json.loads((tmp_path / "ppo" / "samples.json").read_text())
    assert [answer["label"] for answer in samples[0]["answers"]] == ["before", "after"] and len(samples) == 4
    page = (tmp_path / "ppo" / "report.html").read_text()
    assert "Reward against KL" in page and samples[0]["answers"][1]["label"] in page
    # the adapter is the whole change from the base, as of any other stage
    again = posttrain.run("sft", *SMALL, "init=ppo", "run.dir=again")
    assert again["parents"][0]["role"] == "init"


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_without_a_value_model(advantage: str, tmp_path: Path) -> None:
    found = posttrain.run(
        "ppo", *TINY, *LORA, "reward.function=ppo_rules:short", f"ppo.advantage={advantage}", "ppo.samples=3", "run.dir=ppo"
    )
    assert found["trainable"]["trained"] == 73_984, "one LoRA, and no value model"
    assert "train/value_loss" not in lines(tmp_path / "ppo")[1]


FAST, SLOW = ("none", "adapter"), ("qlora", "head", "partial", "dora", "vera", "pissa", "rslora")


@pytest.mark.parametrize("method", [*FAST, *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW)])
def test_every_method(method: str, runs: Path, tmp_path: Path) -> None:
    words = [] if method == "none" else [f"+peft={method}"]
    found = posttrain.run(
        "ppo", *TINY, *words, "optim.lr=0.001", "train.max_steps=1", f"init={runs / 'sft'}", f"init_reward={runs / 'rm'}",
        "reward.function=ppo_rules:same", "reward.weights=[1,2]", "run.dir=ppo",
    )  # fmt: skip
    first, step, *_ = lines(tmp_path / "ppo")
    assert first["eval/kl"] == 0 and step["train/kl"] == 0, "policy and reference begin as one"
    assert found["steps"] == 1 and "train/reward_same" in step and "train/reward_model" in step


def test_continue_keeps_the_start_as_reference(runs: Path, tmp_path: Path) -> None:
    posttrain.run("ppo", *TINY, *LORA, "chain.mode=continue", f"init={runs / 'sft'}", f"init_reward={runs / 'rm'}", "run.dir=ppo")
    first, one, two, *_ = lines(tmp_path / "ppo")
    assert first["eval/kl"] == 0 and one["train/kl"] == 0 and two["train/kl"] != 0


@pytest.mark.slow
def test_recomputation_runs_under_its_own_role(runs: Path, tmp_path: Path) -> None:
    words = [*TINY, *LORA, f"init={runs / 'sft'}", f"init_reward={runs / 'rm'}"]
    for name, checkpointing in (("kept", "false"), ("recomputed", "true")):
        posttrain.run("ppo", *words, f"train.gradient_checkpointing={checkpointing}", f"run.dir={name}")
    kept, again = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("kept", "recomputed"))
    assert all((kept[name] - again[name]).abs().max() < 1e-6 for name in kept)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(runs: Path, tmp_path: Path) -> None:
    words = [*TINY, *LORA, "train.max_steps=6", "train.save_steps=1", "ppo.target_kl=1.0", f"init={runs / 'sft'}",
             f"init_reward={runs / 'rm'}"]  # fmt: skip
    posttrain.run("ppo", *words, "run.dir=straight")
    command = [sys.executable, "-m", "posttrain", "ppo", *words, "run.dir=killed"]
    kills = 0

    def newest() -> str:
        return max((p.name for p in (tmp_path / "killed" / "checkpoints").glob("step-*")), default="")

    for pause in (0.0, 0.15, 0.3):
        before = newest()
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and newest() <= before:
            time.sleep(0.02)
        time.sleep(pause)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert newest() > before, "every start goes on from the one before"
    assert kills >= 1
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    straight, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    timeless = [{k: v for k, v in line.items() if "per_second" not in k} for line in lines(tmp_path / "straight")]
    assert timeless == [{k: v for k, v in line.items() if "per_second" not in k} for line in lines(tmp_path / "killed")]


LETTERS = {"a": 1.0, "b": -1.0, "c": 0.0, "d": 0.5, "e": -0.5, "f": 0.8}
CHANCES = {"a": 0.1, "b": 0.3, "c": 0.25, "d": 0.2, "e": 0.1, "f": 0.05}


def bandit(directory: Path) -> tuple[list[int], list[int]]:
    """A model whose next token after one certain prompt is a letter, by CHANCES; returns the prompt and the letters' tokens."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_directory("tiny")[0])
    (letters,) = zip(*(tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS), strict=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, max_position_embeddings=2048,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "choose"}], add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        state = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        along = state / state.norm() ** 2
        apart = torch.randn(len(tokenizer), 32)  # directions in which logits can part, at right angles to the state
        apart -= torch.outer(apart @ along, state)
        logits = torch.full((len(tokenizer),), -20.0)
        logits[list(letters)] = torch.tensor(list(CHANCES.values())).log()
        model.lm_head.weight.copy_(torch.outer(logits, along) + 0.3 * apart)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return prompt, list(letters)


def chances(directory: Path, prompt: list[int], letters: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)[letters]


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_a_bandit_reaches_its_known_optimum(advantage: str, tmp_path: Path) -> None:
    """With one token an answer the best policy is known: proportional to reference * exp(reward / beta)."""
    prompt, letters = bandit(tmp_path / "bandit")
    start = chances(tmp_path / "bandit", prompt, letters)
    assert start.tolist() == pytest.approx(list(CHANCES.values()), abs=1e-3)
    rows = [json.dumps({"messages": [{"role": "user", "content": "choose"}, {"role": "assistant", "content": "a"}]})] * 64
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    posttrain.run(
        "ppo", "model.name=bandit", "model.dtype=float32", "data.path=rows.jsonl", "data.eval_share=0", "eval.sets=null",
        "train.max_steps=120", "train.batch_size=32", "train.grad_accum=2", "train.save_steps=null", "optim.lr=0.01",
        "optim.schedule=linear", "rollout.max_new_tokens=1", "rollout.batch_size=256", "reward.function=ppo_rules:letter",
        "reward.missing_eos_penalty=0", f"ppo.advantage={advantage}", "ppo.samples=4", "ppo.kl_coef=0.5", "ppo.whiten=false",
        "ppo.minibatches=2", "ppo.value_clip=null", "ppo.value_coef=1", "run.dir=ppo",
    )  # fmt: skip
    best = start * torch.tensor(list(LETTERS.values()), dtype=torch.float64).div(0.5).exp()
    best /= best.sum()
    found = chances(tmp_path / "ppo" / "model", prompt, letters)
    assert float((start - best).abs().sum() / 2) > 0.4
    assert float((found - best).abs().sum() / 2) < 0.05


def test_more_prompts_a_step_than_rows(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"say {i}", "completion": "yes"}) for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = ["data.path=rows.jsonl", "data.eval_share=0", "reward.function=ppo_rules:short", "run.dir=ppo"]
    assert posttrain.run("ppo", *TINY, *LORA, *words)["steps"] == 2


def test_an_answer_without_end_is_scored_as_if_it_had_ended(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model has only shaped_reward what ends of turn are worth."""
    seen: list[Any] = []
    inner = ActorCritic.forward

    def spy(self: ActorCritic, batch: Any, role: Any = "policy", *args: Any, **kwargs: Any) -> torch.Tensor:
        if role == "reward":
            seen.append(batch)
        return inner(self, batch, role, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, "forward", spy)
    posttrain.run("ppo", *TINY, *LORA, "train.max_steps=1", f"init={runs / 'sft'}", f"init_reward={runs / 'rm'}", "run.dir=ppo")
    end = AutoTokenizer.from_pretrained(builtin_directory("tiny")[0]).convert_tokens_to_ids("<|im_end|>")
    ended = [batch.tokens[0, batch.eos_index].tolist() for batch in seen]
    assert ended and all(tokens == [end] * len(tokens) for tokens in ended)


def test_defaults_follow_the_method_and_are_said() -> None:
    words = ["model=tiny", "reward.function=posttrain.rewards:brevity"]
    for more, expected in {
        (): ("ppo", 0.05, "reward", "k1", 0.2, 0.2, 64, 1.0, "group"),
        ("ppo.advantage=rloo",): ("ppo", 0.05, "reward", "k1", 0.2, 0.2, 64, 1.0, "group"),
        ("ppo.advantage=grpo",): ("grpo", 0.0, "loss", "k3", 0.2, 0.2, 512, 0.0, "group"),
        ("ppo.advantage=grpo", "ppo.loss=dr_grpo", "ppo.clip=0.1"): ("dr_grpo", 0.0, "loss", "k3", 0.1, 0.1, 512, 0.0, "none"),
        ("ppo.advantage=grpo", "ppo.loss=dapo"): ("dapo", 0.0, "loss", "k3", 0.2, 0.28, 512, 0.0, "group"),
        ("ppo.advantage=rloo", "ppo.loss=gspo"): ("gspo", 0.05, "reward", "k1", 3e-4, 4e-4, 64, 1.0, "group"),
    }.items():
        cfg = compose_run("ppo", [*words, "ppo.samples=2", *more])
        ppo = cfg["ppo"]
        said = (ppo["loss"], ppo["kl_coef"], ppo["kl_in"], ppo["kl_estimator"], ppo["clip"], ppo["clip_high"])
        assert (*said, cfg["rollout"]["max_new_tokens"], cfg["reward"]["missing_eos_penalty"], ppo["scale"]) == expected, more
    lines = lines_of_method(
        typed_config(
            compose_run("ppo", [*words, "ppo.advantage=grpo", "ppo.samples=2", "train.grad_accum=2", "rollout.top_p=0.9"])
        )
    )
    assert lines == [
        "ppo.advantage=grpo ppo.loss=grpo: ratios from 0.8 to 1.2; no KL penalty; answers of up to 512 tokens, "
        "nothing off without an end",
        "ppo.minibatches=4 of train.grad_accum=2 micro-batches: an update has one at least, so a pass has 2",
        "rollout.top_p: answers are drawn from a part of the policy, so gradients are biased; rollout.correction=truncate weighs "
        "what was drawn as the policy does",
    ]


def test_rewards_are_put_together_in_order() -> None:
    cfg = compose_run("ppo", ["model=tiny", "reward.function=[a:b,c:d]", "reward.weights=[2,-1]", "reward.clip=3"])
    reward, shaped_reward = combined(
        [torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.0])],
        torch.tensor([True, False]),
        typed_config(cfg).reward,
    )
    assert reward.tolist() == [1.5, 8.0] and shaped_reward.tolist() == [1.5, 3.0 - 1.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing gives a reward"),
        (("reward.function=ppo_rules:missing",), "no 'missing' in ppo_rules"),
        (("reward.function=nowhere",), "module:name"),
        (("reward.function=ppo_rules:short", "rollout.temperature=0"), "rollout.temperature"),
        (("reward.function=ppo_rules:short", "rollout.max_new_tokens=2000"), "rollout.max_new_tokens"),
        (("reward.function=ppo_rules:short", "train.max_length=14"), "train.max_length"),
        (("reward.function=ppo_rules:short", "train.max_length=100000"), "context"),
        (("reward.function=ppo_rules:short", "ppo.advantage=grpo"), "ppo.samples"),
        (
            ("reward.function=ppo_rules:short", "ppo.advantage=grpo", "ppo.samples=2", "ppo.kl_coef=0.1", "ppo.kl_in=reward"),
            "ppo.kl_in",
        ),
        (("reward.function=ppo_rules:short", "ppo.kl_in=loss", "ppo.kl_estimator=k1"), "gradient of mean 0"),
        (("reward.function=ppo_rules:short", "ppo.kl_coef=0", "ppo.target_kl=2"), "ppo.target_kl"),
        (("reward.function=ppo_rules:short", "ppo.loss=drgrpo"), "did you mean 'dr_grpo'"),
        (("reward.function=ppo_rules:short", "reward.weights=[1,2]"), "reward.weights"),
        (("init_reward=SFT",), "a sft run"),
        (("reward.function=ppo_rules:short", "reward.gold=SFT"), "reward.gold"),
        (("reward.function=ppo_rules:short", "+peft=adalora"), "adalora"),
    ],
)
def test_bad_input_is_refused_before_a_model_loads(
    words: tuple[str, ...], said: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.stages.language.build.load_causal", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=said):
        posttrain.run("ppo", *TINY, *(word.replace("SFT", str(runs / "sft")) for word in words), "run.dir=ppo")


def test_a_reward_model_of_another_tokenizer_is_refused(runs: Path) -> None:
    posttrain.run("rm", *SMALL, "model.chat_template=chatml", "run.dir=other")
    with pytest.raises(UserError, match="init_reward: other has another tokenizer"):
        posttrain.run("ppo", *TINY, *LORA, f"init={runs / 'sft'}", "init_reward=other", "run.dir=ppo")


@pytest.mark.parametrize(("name", "said"), [("broken", "raised KeyError"), ("nan", "gave nan"), ("few", "gave 1 scores for 2")])
def test_a_reward_function_that_fails_is_named(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        posttrain.run("ppo", *TINY, *LORA, f"reward.function=ppo_rules:{name}", "run.dir=ppo")


def test_a_reward_that_fails_on_the_way_loses_nothing(tmp_path: Path) -> None:
    """Two steps are kept, and the same command goes on with the third, to the bits of a run without fault."""
    text = "import os\nclass Worth:\n    def __init__(self): self.calls = 0\n"
    text += "    def __call__(self, answers):\n        self.calls += 1\n"
    text += "        if self.calls == 4 and os.path.exists('away'): raise OSError('the endpoint is away')\n"
    text += "        return [len(answer) / self.calls for answer in answers]\n"
    text += "    def state_dict(self): return {'calls': self.calls}\n"
    text += "    def load_state_dict(self, state): self.calls = state['calls']\n"
    (tmp_path / "failing_rewards.py").write_text(text)
    words = [
        *TINY,
        *LORA,
        "train.max_steps=3",
        "train.save_steps=null",
        "reward.function=failing_rewards:Worth",
        "eval.sets=null",
    ]
    words += ["ppo.advantage=rloo", "ppo.samples=2", "data.eval_rows=2", "rollout.max_new_tokens=4", "train.grad_accum=2"]
    (tmp_path / "away").touch()
    with pytest.raises(RunError) as caught:
        posttrain.run("ppo", *words, "run.dir=ppo")
    assert str(caught.value) == (
        "reward function failing_rewards:Worth raised OSError: the endpoint is away; saved after step 2 of 3, "
        "the same command goes on"
    )
    (tmp_path / "away").unlink()
    posttrain.run("ppo", *words, "run.dir=ppo")
    posttrain.run("ppo", *words, "run.dir=straight")
    mine, its = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("ppo", "straight"))
    assert all(torch.equal(mine[name], value) for name, value in its.items())


def test_a_function_is_found_in_the_current_directory() -> None:
    assert load_function("ppo_rules:same", "reward.function").name == "ppo_rules:same"
