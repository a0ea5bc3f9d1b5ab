"""Sections of DreamBooth."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from posttrain.config.fields import NonNegative, Positive, Rate, Strict, listed


class ImageData(Strict):
    """`data` of dreambooth: the pictures, their captions and how they are cut."""

    instance_dir: str | None
    instance_prompt: str | None
    class_prompt: str | None
    class_dir: str | None
    token: str | None
    captions: Literal["prompt", "files", "metadata"]
    size: Annotated[int, Field(ge=8)] | None
    buckets: bool
    crops: Positive
    flip: bool
    background: str
    mask: str | None  # alpha, or a directory
    corrupt: Literal["stop", "skip"]
    cache: bool


class PriorConfig(Strict):
    """`prior`: class images that keep the class as it is."""

    weight: Annotated[float, Field(ge=0)]
    images: Positive
    inference_steps: Positive
    guidance: Annotated[float, Field(ge=0)] | None
    batch_size: Positive


class DreamboothConfig(Strict):
    """`dreambooth`: what is trained, and how noise is drawn and weighed."""

    text_encoder: bool
    levels: Literal["auto", "uniform", "logit_normal"]
    min_snr: Rate | None
    noise_offset: Annotated[float, Field(ge=0)]


class SampleConfig(Strict):
    """`sample`: pictures that are drawn at every evaluation."""

    images: NonNegative
    prompts: Annotated[list[str], BeforeValidator(listed)]
    unrelated: Annotated[list[str], BeforeValidator(listed)]
    inference_steps: Positive
    guidance: Annotated[float, Field(ge=0)] | None
    batch_size: Positive


class DriftConfig(Strict):
    """`eval` of dreambooth: how drift and similarity are measured."""

    images: NonNegative
    levels: Positive
    clip: str | None
    dino: str | None
