"""Sections of DreamBooth."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from posttrain.config.fields import NonNegative, Positive, Rate, Strict, listed


class ImageData(Strict):
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
    weight: Annotated[float, Field(ge=0)]
    images: Positive
    inference_steps: Positive
    guidance: Annotated[float, Field(ge=0)] | None
    batch_size: Positive


class DreamboothConfig(Strict):
    text_encoder: bool
    levels: Literal["auto", "uniform", "logit_normal"]
    min_snr: Rate | None
    noise_offset: Annotated[float, Field(ge=0)]


class SampleConfig(Strict):
    images: NonNegative
    prompts: Annotated[list[str], BeforeValidator(listed)]
    unrelated: Annotated[list[str], BeforeValidator(listed)]
    inference_steps: Positive
    guidance: Annotated[float, Field(ge=0)] | None
    batch_size: Positive


class DriftConfig(Strict):
    images: NonNegative
    levels: Positive
    clip: str | None
    dino: str | None
