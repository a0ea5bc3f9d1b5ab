"""The config of continued pre-training."""

from __future__ import annotations

from posttrain.config.schema import Guarded


class Cpt(Guarded):
    """No settings of its own."""

    gives = frozenset({"rows", "loss", "quantized"})
