"""The config of supervised fine-tuning."""

from __future__ import annotations

from posttrain.config.schema import Conversational


class Sft(Conversational):
    """Nothing of its own."""
