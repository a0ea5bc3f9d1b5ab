"""A classifier that peft has saved, and no run of ours, as the reward: it scores as transformers and peft say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import posttrain
from posttrain.config.compose import compose_run
from posttrain.config.schema import DataConfig
from posttrain.data.chat.encoder import Encoder
from posttrain.data.collate import pack_pairs
from posttrain.data.prepare import prepare
from posttrain.errors import UserError
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.loading import load_model, scorer
from posttrain.runs.cache_place import cache_root
from posttrain.stages.spec import row_uses

pytestmark = pytest.mark.slow
WORDS = ("model=tiny", "+peft=lora", "model.dtype=float32", "train.max_steps=1", "train.batch_size=2", "train.grad_accum=1",
         "data.max_rows=8", "data.eval_rows=2", "rollout.max_new_tokens=4", "eval.sets=null")  # fmt: skip


def classifier(folder: Path, labels: int) -> Path:
    base = str(builtin_directory("tiny")[0])
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    made: Any = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32), lora
    )
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "score" in name:
            parameter.data.normal_(0, 0.1)
    made.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("reward") / "clf", 1)


def test_it_scores_as_peft_does(reward: Path) -> None:
    base = str(builtin_directory("tiny")[0])
    data = DataConfig.model_validate(compose_run("rm", ["model=tiny", "data.max_rows=40", "data.eval_rows=8"])["data"])
    train = prepare(data, row_uses()["rm"], Encoder(AutoTokenizer.from_pretrained(base)), 512, cache_root())[0].train
    found = scorer(load_model(reward, dtype="float32", scores=True))(pack_pairs(train, [0, 1]))
    plain: Any = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32), str(reward)
    )
    plain.eval().config.pad_token_id = None  # the last token is scored
    wanted = []
    for unit in (0, 1):
        ids, _ = train.sequence(unit)
        prompt, middle = (int(x) for x in train.splits[unit])
        for answer in (ids[prompt:middle], ids[middle:]):
            wanted.append(float(plain(input_ids=torch.tensor([[*ids[:prompt], *answer]])).logits[0, 0]))
    assert found.tolist() == pytest.approx(wanted, abs=1e-5) and torch.tensor(wanted).std() > 0.01


@pytest.mark.parametrize("how", ["gae", "grpo"])
def test_a_policy_learns_from_it(how: str, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, f"init_reward={reward}", f"ppo.advantage={how}", "ppo.samples=2", f"run.dir={tmp_path}/run"]
    made = posttrain.run("ppo", *words)
    said = " ".join(capsys.readouterr().out.split())
    assert "init_reward:" in said and "is a classifier of others" in said
    assert "models of their own in memory" not in said  # it takes turns with the policy on one base
    assert made["metrics"]["eval/reward_before"] != 0.0 and made["parents"] == []


def test_what_is_no_reward_is_refused(tmp_path: Path) -> None:
    two = classifier(tmp_path / "two", 2)
    with pytest.raises(
        UserError, match=r"init_reward: .* has 2 labels; give a classifier with one, or reward.function=classifier"
    ):
        posttrain.run("ppo", *WORDS, f"init_reward={two}", f"run.dir={tmp_path}/no")
    with pytest.raises(UserError, match=r"init_reward: .*tiny.* is no reward model; give what posttrain rm has made"):
        posttrain.run("ppo", *WORDS, f"init_reward={builtin_directory('tiny')[0]}", f"run.dir={tmp_path}/other")
