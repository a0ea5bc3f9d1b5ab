"""The config of continued pre-training."""

from __future__ import annotations

from posttrain.config.schema import Guarded


class Cpt(Guarded):
    """Nothing of its own."""
