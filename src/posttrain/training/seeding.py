"""All randomness of a step is a function of the run's seed and the step's number: there is no state to save or lose."""

from __future__ import annotations

import random

import numpy as np
import torch


def row_seed(seed: int, step: int, part: int, place: int) -> int:
    """Below 2**62, for one row of a step: the same whichever process the row falls to, and whatever is computed beside it."""
    return int(np.random.SeedSequence((seed, step, part, place)).generate_state(1, np.uint64)[0]) >> 2  # of an int, for numpy 1


def seed_step(seed: int, step: int, part: int) -> None:
    """Seed torch, Python and numpy for one part of a step: a micro-batch, a rollout, an evaluation."""
    number = (seed * 1_000_003 + step) * 8191 + part
    torch.manual_seed(number)
    random.seed(number)  # nothing of ours draws from these two; a reward function may
    np.random.seed(number % 2**32)
