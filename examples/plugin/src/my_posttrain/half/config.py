"""The stage's config; its defaults are in configs/half.yaml."""

from posttrain.config.fields import Rate, Strict
from posttrain.config.schema import Guarded


class HalfConfig(Strict):
    """`half`: what the stage has of its own."""

    scale: Rate


class Half(Guarded):
    """Config of `posttrain half`."""

    half: HalfConfig
