"""rollout.engine=vllm. vLLM itself needs CUDA; in its place stands one that keeps what it is asked and writes by transformers."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.errors import UserError
from posttrain.models.language.vllm_engine import Engine

PPO = (
    "model=tiny", "+peft=lora", "train.max_steps=2", "train.batch_size=2", "train.grad_accum=2", "ppo.minibatches=2",
    "data.max_rows=40", "data.eval_rows=2", "rollout.max_new_tokens=6", "optim.lr=0.01",
    "reward.function=posttrain.rewards:overlap",
)  # fmt: skip


class FakeLLM:
    """Draws by the adapter that it is handed, on the base that it was given."""

    def __init__(self, **options: Any) -> None:
        self.options, self.asked = options, []

    def generate(self, inputs: list[Any], wanted: list[Any], use_tqdm: bool, lora_request: Any) -> list[Any]:
        base = AutoModelForCausalLM.from_pretrained(self.options["model"], dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(base, lora_request.path)
        self.asked.append((lora_request.name, lora_request.number, wanted))
        found = []
        for each, want in zip(inputs, wanted, strict=True):
            outputs = []
            for i in range(want.n):
                generator = torch.Generator().manual_seed(want.seed + i)
                tokens, logps = [], []
                while len(tokens) < want.max_tokens and (not tokens or tokens[-1] not in want.stop_token_ids):
                    ids = torch.tensor([each["prompt_token_ids"] + tokens])
                    with torch.no_grad():
                        row = (model(ids).logits[0, -1].float() / want.temperature).log_softmax(-1)
                    tokens.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
                    logps.append({tokens[-1]: SimpleNamespace(logprob=float(row[tokens[-1]]))})
                outputs.append(SimpleNamespace(token_ids=tokens, logprobs=logps))
            found.append(SimpleNamespace(outputs=outputs))
        return found


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    made: list[FakeLLM] = []
    fake, inside, lora = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    fake.LLM = lambda **options: made.append(FakeLLM(**options)) or made[-1]  # type: ignore[attr-defined]
    fake.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    fake.TokensPrompt = dict  # type: ignore[attr-defined]
    lora.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)  # type: ignore[attr-defined]
    for name, module in (("vllm", fake), ("vllm.lora", inside), ("vllm.lora.request", lora)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("posttrain.stages.ppo.stage.check_engine", lambda: None)
    return made


def test_the_engine_writes_by_the_policy_of_every_step(vllm: list[FakeLLM], tmp_path: Path) -> None:
    """The gap between its log-probs and those of the packs is rounding (bfloat16 against float32) at every step, also after
    updates: it was handed the adapter as it then was."""
    manifest = posttrain.run("ppo", *PPO, "model.dtype=float32", "rollout.engine=vllm", f"run.dir={tmp_path / 'ppo'}")
    (llm,) = vllm
    assert llm.options["max_lora_rank"] == 16 and llm.options["model"] == manifest["base"]["path"]
    assert [number for _, number, _ in llm.asked] == [1, 2, 3, 4]  # before, two steps, after
    assert all(want.n == 1 and want.logprobs == 0 and want.top_k == -1 for _, _, wanted in llm.asked for want in wanted)
    steps = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["train/sampling_gap"] for line in steps if "train/sampling_gap" in line]
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_ranks_are_rounded_up_to_what_vllm_has(vllm: list[FakeLLM]) -> None:
    Engine("base", rank=24, max_length=64, memory_share=0.5, seed=0)
    assert vllm[0].options["max_lora_rank"] == 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without CUDA")
def test_without_cuda_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs CUDA"):
        posttrain.run("ppo", *PPO, "rollout.engine=vllm", f"run.dir={tmp_path / 'ppo'}")


def test_what_it_cannot_be_handed_is_refused() -> None:
    with pytest.raises(UserError, match="handed a LoRA"):
        posttrain.run("ppo", *PPO, "rollout.engine=vllm", "quant=nf4")
