"""Answers written by vLLM, which keeps its own copy of the base and gets the policy's adapter before every rollout."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.models.language.generation import Answer, Sampling

if TYPE_CHECKING:
    from posttrain.models.language.packed_lm import PackedLM

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM makes room for


class Engine:
    """base: directory or hub id of the frozen base. rank: of the whole adapter, stacked ones added up."""

    def __init__(self, base: str, *, rank: int, max_length: int, memory_share: float, seed: int) -> None:
        import vllm  # pyright: ignore[reportMissingImports]

        self.base = base
        self.llm: Any = vllm.LLM(
            model=base, dtype="bfloat16", enable_lora=True, max_loras=1, max_lora_rank=next(r for r in RANKS if r >= rank),
            max_model_len=max_length, gpu_memory_utilization=memory_share, logprobs_mode="processed_logprobs", seed=seed,
        )  # fmt: skip
        self.rollouts = 0

    def sample(
        self,
        lm: PackedLM,
        prompts: Sequence[Sequence[int]],
        samples: int,
        sampling: Sampling,
        ends: Sequence[int],
        seeds: Sequence[int] | None = None,
    ) -> list[list[Answer]]:
        """As `generation.sample`, but for one figure: an answer's entropy is the mean of -log p over its tokens, which is the
        entropy in expectation."""
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        self.rollouts += 1
        seeds = torch.randint(2**31, (len(prompts),)).tolist() if seeds is None else seeds
        wanted = [
            SamplingParams(
                n=samples, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1,
                max_tokens=sampling.max_new_tokens, stop_token_ids=list(ends), ignore_eos=True, logprobs=0,
                detokenize=bool(sampling.stop), stop=list(sampling.stop) or None, include_stop_str_in_output=True, seed=seed,
            )
            for seed in seeds
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            lm.save_adapter(Path(folder), self.base, is_writer=True)
            policy = LoRARequest(f"policy-{self.rollouts}", self.rollouts, folder)
            inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
            found = self.llm.generate(inputs, wanted, use_tqdm=False, lora_request=policy)
        return [[_answer(output, ends, sampling) for output in each.outputs] for each in found]


def _answer(output: Any, ends: Sequence[int], sampling: Sampling) -> Answer:
    tokens = list(output.token_ids)
    logps = [float(place[token].logprob) for token, place in zip(tokens, output.logprobs, strict=True)]
    return Answer(tokens, logps, tokens[-1] in ends or sampling.stops(tokens), -sum(logps) / len(logps))
