"""Answers whose every token is one recorded step of the device: the host starts it as a whole, where it would else start each of
its some thousand small kernels.

Where it can be had it is used by itself. A model is tried before: does a recorded step give what the growing cache gives?
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.console import say
from posttrain.devices.host_waits import HostWaits
from posttrain.devices.recording import once, record, records
from posttrain.errors import first_line, is_out_of_memory
from posttrain.models.language.drawing import Drawn, Sampling, Step
from posttrain.models.language.growing import FixedAnswers, growing_answers, reads_prompts_packed
from posttrain.models.language.packed_lm import PackedLM

KERNEL = "CUDA graph of a token"  # its name in the report of kernels
TRIED = (5, 2, 3)  # tokens of the prompts that are tried, of which each answer has three more
# Mean KL in nats a token that rounding may cause. In bfloat16 it was 3e-3 of SmolLM2.
TOLERATED_KL, TOLERATED_KL_16_BIT = 1e-5, 5e-2


class Replayed:
    """`Step` of answers over tensors that stay where they are. Where they were made anew it is done as it is, and after that
    recorded; a recording that fails is given up for good, with a line."""

    def __init__(self, lm: PackedLM, growing: FixedAnswers, sampling: Sampling) -> None:
        self.lm, self.growing, self.step = lm, growing, Step(lm, growing, sampling)
        self.made = -1
        self._play: Callable[[], Drawn] | None = None

    def __call__(self, tokens: Tensor, numbers: Tensor) -> Drawn:
        """As `Step`; what it gives is overwritten by the next call."""
        self.growing.ready()
        if self.made != self.growing.made:
            self.made, self._play = self.growing.made, None
            self._inputs = tokens.clone(), numbers.clone()
            return once(self._eager)
        for own, new in zip(self._inputs, (tokens, numbers), strict=True):
            own.copy_(new)
        if self._play is None:
            self._play = self._recorded()
        return self._play()

    def _eager(self) -> Drawn:
        return self.step(*self._inputs)

    def _recorded(self) -> Callable[[], Drawn]:
        if not self.lm.replays:
            return self._eager
        try:
            return record(self._eager)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            give_up(self.lm, first_line(error))
            return self._eager


def replays(lm: PackedLM, sampling: Sampling) -> bool:
    """Are answers written so? Found out once for a model, inside of `for_inference`."""
    if lm.report.kernels != "auto" or not records(lm.causal.device):
        return False
    if lm.replays is None:
        lm.replays = True
        if why := _known(lm) or _tried(lm, sampling):
            give_up(lm, why)
        elif lm.replays:  # where a recording failed in the try it is given up already
            lm.report = lm.report.with_taken(KERNEL)
    return lm.replays


def give_up(lm: PackedLM, why: str) -> None:
    """Write answers with the growing cache from now on."""
    lm.replays = False
    lm.report = lm.report.with_left(KERNEL, type(lm.causal).__name__, why)
    say(lm.report.warning)


def _known(lm: PackedLM) -> str:
    """What needs no try."""
    if not reads_prompts_packed(lm):
        return "it does not read prompts as a pack"
    return "autocast is on" if torch.is_autocast_enabled(lm.causal.device.type) else ""


def _tried(lm: PackedLM, sampling: Sampling) -> str:
    """'' where a step can be recorded and gives the chances that the growing cache gives, else why not."""
    try:
        if waits := _waits(lm, sampling):
            return f"its step waits for the device ({waits[0]})"
        found = [_chances(lm, sampling, fixed) for fixed in (False, True)]
    except Exception as error:  # of a kernel, a driver or a model: whatever it is, the growing cache is there
        return f"it does not run here ({first_line(error)})"
    before, after = (torch.stack(each) for each in found)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    within = TOLERATED_KL if lm.causal.dtype == torch.float32 else TOLERATED_KL_16_BIT
    return "" if kl <= within else f"it gives other chances (KL {kl:.1e} a token)"


def _waits(lm: PackedLM, sampling: Sampling) -> list[str]:
    """For what a step of fixed answers waits."""
    prompts, tokens, numbers = _given(lm)
    growing = growing_answers(lm, prompts, 1, fixed=True)
    assert isinstance(growing, FixedAnswers)
    growing.ready()
    with HostWaits() as waits:
        Step(lm, growing, sampling)(tokens[0], numbers)
    return waits.found


def _chances(lm: PackedLM, sampling: Sampling, fixed: bool) -> list[Tensor]:
    """float64 [n, V] of each token; of fixed answers the first is done as it is, the second recorded, the third replayed."""
    prompts, tokens, numbers = _given(lm)
    growing = growing_answers(lm, prompts, 1, fixed)
    step = Replayed(lm, growing, sampling) if isinstance(growing, FixedAnswers) else Step(lm, growing, sampling)
    return [step(each, numbers).logps.double() for each in tokens]


def _given(lm: PackedLM) -> tuple[list[list[int]], list[Tensor], Tensor]:
    """Prompts, the tokens int64 [n, 1] that their answers grow by, and random numbers."""
    words = lm.causal.config.get_text_config().vocab_size
    drawn = torch.randint(words, (len(TRIED), max(TRIED) + 3), generator=torch.Generator().manual_seed(1))
    tokens = drawn[:, -3:, None].to(lm.causal.device).unbind(1)
    prompts = [row[:length].tolist() for row, length in zip(drawn, TRIED, strict=True)]
    return prompts, list(tokens), torch.full_like(tokens[0], 0.5, dtype=torch.float64)
