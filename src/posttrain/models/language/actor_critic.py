"""Policy, reference, value and reward: adapters that take turns on one base where they can, else models of their own."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.batch import PackedBatch
from posttrain.models.kernels.logprobs import token_entropies
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.peft.names import todays_names
from posttrain.models.peft.quantized import read_packed

Role = Literal["policy", "reference", "value", "reward", "gold"]
VALUE = "value"  # peft's name of the value model's adapter


class ActorCritic(nn.Module):
    """What PPO asks of its models, each under its role.

    adapters: role -> which adapters of `policy`'s model set_role for it; a role that is not named there uses all adapters of
    its own model. reference: None where the policy without its new adapter is it.
    """

    def __init__(
        self, policy: PackedLM, reference: PackedLM | None, scorers: dict[str, PackedScorer], adapters: dict[str, list[str]]
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        self.scorers = nn.ModuleDict(scorers)
        self.adapters = adapters
        self._speaking: list[str] | None = None

    def forward(self, batch: PackedBatch, role: Role = "policy", temperature: float = 1.0, with_entropy: bool = False) -> Tensor:
        """float32, by role. policy, reference: log-probs [N] at `temperature`; with_entropy: over the entropies in nats, [2, N].
        value: of the state before each target [N]. reward, gold: a score for each answer [num_answers]."""
        self.set_role(role)
        if with_entropy:
            hidden, source = self.policy.read(batch, batch.logit_index)
            logps = self.policy.logprobs(hidden[source], batch.target, temperature)
            return torch.stack([logps, token_entropies(hidden[source], self.policy.head.at(temperature))])
        if role == "policy":
            return self.policy(batch, temperature)
        if role == "reference":
            return (self.reference or self.policy)(batch, temperature)
        scorer: Any = self.scorers[role]
        return scorer.values(batch) if role == "value" else scorer(batch)

    def set_role(self, role: Role) -> None:
        """From here on the shared base carries this role's adapters. What is trained stays as it is."""
        names = self.adapters.get(role)
        if names is None or names == self._speaking:
            return
        for layer in adapter_layers(self.policy):
            own = [name for name in names if name in getattr(layer, "token_indices", names)]  # few have rows of the embedding
            layer._active_adapter = own
            layer._disable_adapters = not own
        self._speaking = names


def adapter_layers(module: nn.Module) -> list[Any]:
    """The layers of a model that carry peft adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def add_beside(model: Any, like: str, name: str, dtype: torch.dtype) -> None:
    """A new trainable adapter of the same kind as `like`, which keeps its own state of training."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with todays_names():  # or peft renames what it has named itself
        model.add_adapter(name, copy.deepcopy(model.peft_config[like]))
    read_packed(model)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    for parameter in trained:
        parameter.requires_grad_(True)
