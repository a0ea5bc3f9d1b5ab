"""The base's own dropout, which an objective that compares two passes over the same tokens cannot have on."""

from __future__ import annotations

from torch import nn


def switch_off_dropout(model: nn.Module) -> None:
    """Every dropout of a base without adapters, in layers and in attention, to 0, and no noise in its routers.

    Its config, which is saved, stays as it is.
    """
    for module in list(model.modules()):
        if any("jitter" in name for name in vars(module)):
            _always_in_evaluation(module)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _always_in_evaluation(module: nn.Module) -> None:
    """The module itself, not what is in it. Some routers draw at random in training, and with 0 for their noise are others."""

    def train(mode: bool = True) -> nn.Module:
        for child in module.children():
            child.train(mode)
        return module

    module.train, module.training = train, False
