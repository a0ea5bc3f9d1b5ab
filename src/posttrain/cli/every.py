"""All commands, in the order of the help."""

from posttrain.cli import stage_commands, results, weights, before, machine  # isort: skip
from posttrain.cli.words import app

__all__ = ["app", "before", "machine", "results", "stage_commands", "weights"]
