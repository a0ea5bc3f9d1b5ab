"""Random diffusion pipelines of every family, made on the spot: for tests and dry runs. Their tokenizers too need no
download."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.models.diffusion.families import diffusers, quiet

SIZE = 32  # pixels a side
_DIFFUSION_STEPS: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False,
    "set_alpha_to_one": False,
}  # fmt: skip


def make_tiny(kind: str, out: Path) -> str:
    """Write a pipeline of `kind` (a key of TINY) in diffusers' format; what it is, in words."""
    quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        TINY[kind]().save_pretrained(out)
    return "random, made on the spot"


def _stable_diffusion(prediction: str = "epsilon") -> Any:
    scheduler = diffusers.DDIMScheduler(**_DIFFUSION_STEPS, prediction_type=prediction)
    return diffusers.StableDiffusionPipeline(
        vae=_vae(4), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=_unet(32), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _stable_diffusion_xl() -> Any:
    unet = _unet(
        64, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
        use_linear_projection=True,
    )  # fmt: skip
    steps = {key: value for key, value in _DIFFUSION_STEPS.items() if key not in ("clip_sample", "set_alpha_to_one")}
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=clip_text(), text_encoder_2=clip_text(projected=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet, scheduler=diffusers.EulerDiscreteScheduler(**steps),
    )  # fmt: skip


def _stable_diffusion_3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=32,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(4, shift=0.1),
        text_encoder=clip_text(projected=True), tokenizer=clip_tokenizer(), text_encoder_2=clip_text(projected=True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=_t5_encoder(64), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=_vae(4, shift=0.1),
        text_encoder=clip_text(), tokenizer=clip_tokenizer(), text_encoder_2=_t5_encoder(32), tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def _vae(channels: int, shift: float | None = None) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32), latent_channels=channels, norm_num_groups=8, sample_size=SIZE, scaling_factor=0.5,
        shift_factor=shift, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    )  # fmt: skip


def _unet(text_width: int, **more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=4, cross_attention_dim=text_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip


def clip_text(width: int = 32, layers: int = 2, projected: bool = False, tokenizer: Any = None) -> Any:
    """A random CLIP text encoder for a `clip_tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tokenizer or clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5_encoder(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=4)
    )


def clip_tokenizer(words: tuple[str, ...] = (), max_length: int = 77) -> Any:
    """CLIP's byte-pair encoding over letters and digits; each of `words` (lower case) is one token beside them."""
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    merges: list[Any] = []
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            if merge not in merges:
                merges.append(merge)
                vocab.append("".join(merge))
            parts = ["".join(merge), *parts[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))}, merges=merges, model_max_length=max_length
    )


def t5_tokenizer() -> Any:
    """T5's unigram model over single letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    scores = [0.0, 0.0, 0.0, *(-3.0 for _ in pieces[3:])]
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, model_max_length=77)


TINY: dict[str, Callable[[], Any]] = {
    "tiny": _stable_diffusion,
    "tiny-v": lambda: _stable_diffusion("v_prediction"),
    "tiny-sdxl": _stable_diffusion_xl,
    "tiny-sd3": _stable_diffusion_3,
    "tiny-flux": _flux,
}
