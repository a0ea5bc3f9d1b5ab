"""Which modules a kernel is for, and whether it computes what they do: they are run beside each other once, on random input.

So a comment that changes upstream changes nothing here, and a formula that changes is seen. The modules are copies of a few
numbers; the model's own weights may be of any device, or of none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from inspect import unwrap
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from posttrain.models.kernels.fused import is_plain, lora_forward, mlp_forward, norm_forward, with_lora
from posttrain.models.kernels.pointwise import rotary, rotate
from posttrain.models.quantization.packed import packed_of, stored

# written for these, in the versions of transformers that pyproject.toml allows; other modules are as they turn out to be
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
NORMS = [f"{family}RMSNorm" for family in (*FAMILIES, "Phi3")]
MLPS = [f"{family}MLP" for family in FAMILIES]
ATTENTIONS = [f"{family}Attention" for family in FAMILIES]
ROTATION = "apply_rotary_pos_emb"  # RoPE, in each family's own file
WIDTH, INNER = 64, 96  # of the copies
CLOSE = 1e-5  # rounding of LoRA's two ways of adding up, in float32
FORMATS = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))  # of input, weight
TURNED = (*FORMATS[::2], (torch.float32, torch.bfloat16))  # of queries, angles; of 16 bits alone some families round more often
OTHERWISE = "computes it otherwise than the versions that the kernel was written for"


class Kernel(NamedTuple):
    """A forward of ours for one kind of module.

    forward: for a class of modules. is_candidate: might it be for this module? differs: '' where it computes what the module
    does, else why it is not given to it. is_expected: was it written for modules like this one? triton: what Triton's kernels
    (pointwise.py) are to it: nothing, faster than what it does without them, or all that there is to it.
    """

    name: str
    forward: Callable[[type[nn.Module]], Callable[..., Any]]
    is_candidate: Callable[[nn.Module], bool]
    differs: Callable[[nn.Module], str]
    is_expected: Callable[[nn.Module], bool]
    triton: Literal["nothing", "faster", "all"] = "nothing"


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _is_known_norm(module: nn.Module) -> bool:
    return type(module).__name__ in NORMS


def _is_gated(module: nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return type(module).__name__ in MLPS or all(hasattr(module, part) for part in parts)


def _is_known_mlp(module: nn.Module) -> bool:
    """With SwiGLU; the same classes compute GeGLU where the model's config says so."""
    return type(module).__name__ in MLPS and "gelu" not in type(getattr(module, "act_fn", None)).__name__.lower()


def _is_attention(module: nn.Module) -> bool:
    """Whose forward itself calls its file's rotation."""
    forward = unwrap(type(module).forward)
    return isinstance(forward, FunctionType) and ROTATION in forward.__code__.co_names and ROTATION in forward.__globals__


def _is_known_attention(module: nn.Module) -> bool:
    return type(module).__name__ in ATTENTIONS


def _rotation_differs(module: nn.Module) -> str:
    own, random = unwrap(type(module).forward).__globals__[ROTATION], Generator().manual_seed(0)
    why = f"transformers {version('transformers')} {OTHERWISE}" if _is_known_attention(module) else "it is another function"
    q, k, angles = _normal(random, 2, 4, 5, WIDTH), _normal(random, 2, 2, 5, WIDTH), _normal(random, 2, 5, WIDTH)
    for of_x, of_angles in TURNED:
        turn = [part.to(of_angles) for part in (angles.cos(), angles.sin())]
        try:
            found = own(q.to(of_x), k.to(of_x), *turn)
        except Exception:  # such as other arguments
            return why
        wanted = [rotate(x.to(of_x), *turn).to(made.dtype) for x, made in zip((q, k), found, strict=True)]
        if not all(map(torch.equal, found, wanted)):
            return why
    return ""


@cache
def _attention_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """The class's own forward, which finds our rotation under the name of its file's: other models' is left as it is."""
    own: Any = unwrap(kind.forward)  # transformers 5.24 wraps it, for the older name of an argument
    names = {**own.__globals__, ROTATION: rotary(own.__globals__[ROTATION])}
    found = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    found.__kwdefaults__ = own.__kwdefaults__
    return found


def _norm_differs(module: nn.Module) -> str:
    def small(random: Generator, dtype: torch.dtype, of_weight: torch.dtype) -> Any:
        return _copy_of(module, {"weight": nn.Parameter(_normal(random, WIDTH).to(of_weight))}, {})

    return _differs(module, norm_forward, small, _is_known_norm(module))


def _mlp_differs(module: nn.Module) -> str:
    def small(random: Generator, dtype: torch.dtype, of_weight: torch.dtype) -> Any:
        layers: dict[str, nn.Module] = {}
        for name, (into, out) in {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}.items():
            layers[name] = layer = nn.Linear(into, out, bias=False, device="meta")
            layer.weight = nn.Parameter(_normal(random, out, into).to(dtype))
        return _copy_of(module, {}, layers)

    return _differs(module, mlp_forward, small, _is_known_mlp(module))


def _differs(module: nn.Module, forward: Callable[..., Tensor], small: Callable[..., Any], expected: bool) -> str:
    """'' where the module's own forward and ours give the same bits in every format, and take the same arguments."""
    own: Any = type(module).forward
    why = f"transformers {version('transformers')} {OTHERWISE}" if expected else "it is another function"
    if list(inspect.signature(own).parameters) != list(inspect.signature(forward).parameters):
        return why
    for formats in FORMATS:
        random = Generator().manual_seed(0)
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                copied, x = small(random, *formats), _normal(random, 3, WIDTH).to(formats[0])
                theirs, ours = own(copied, x), forward(copied, x)
        except Exception:  # such as an attribute that is not there
            return why
        if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
            return why
    return ""


def _copy_of(module: nn.Module, parameters: dict[str, nn.Parameter], modules: dict[str, nn.Module]) -> Any:
    """The module with these parts in place of its own, and with none of its weights."""
    found = copy.copy(module)
    found._parameters, found._modules = dict(parameters), {**module._modules, **modules}  # pyright: ignore
    return found


def _normal(random: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, device="cpu")


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def adds_more(module: nn.Module) -> bool:
    """Does one of its adapters do more than add a product (DoRA and others)?"""
    return bool(getattr(module, "lora_variant", None))


def _is_known_lora(module: Any) -> bool:
    from peft.tuners.lora import Linear

    kinds = [Linear, *_four_bit()]
    base = module.base_layer
    known = type(base).__name__ in ("Linear", "Linear4bit") or packed_of(base, "weight") is not None
    return type(module) in kinds and known and not adds_more(module)


def _four_bit() -> list[type[nn.Module]]:
    try:
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError:  # without bitsandbytes peft does not have it
        return []
    return [Linear4bit]


def _lora_differs(module: Any) -> str:
    if adds_more(module):
        return "its adapters do more than add a product"
    if not _is_known_lora(module):
        return f"over {type(module.base_layer).__name__} it is left to peft"
    device = stored(module.base_layer, "weight").device.type
    return peft_differs(type(module) in _four_bit(), "cpu" if device == "meta" else device)


@cache
def peft_differs(four_bit: bool, device: str) -> str:
    """'' where peft's LoRA layer, over a plain weight or one in NF4, adds up to what ours does, else why ours is not used."""
    from peft import LoraConfig, inject_adapter_in_model

    peft, random = f"peft {version('peft')}", Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast(device, enabled=False):
        try:
            base = _in_four_bit() if four_bit else nn.Linear(WIDTH, INNER)
            made: Any = inject_adapter_in_model(
                LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), nn.Sequential(base.to(device))
            )
            layer, x = made[0].train(), _normal(random, 3, WIDTH).to(device)
            for factors in (layer.lora_A, layer.lora_B):
                weight = factors["default"].weight
                weight.data = _normal(random, *weight.shape).to(device)
            if not is_plain(layer, x):
                return f"{peft} has other layers than the versions that the kernel was written for"
            theirs, ours = type(layer).forward(layer, x), with_lora(layer, x, None)
        except Exception as error:
            return f"{peft} has other layers than the versions that the kernel was written for: {error}"
    return "" if torch.allclose(theirs, ours, rtol=CLOSE, atol=CLOSE) else f"{peft} {OTHERWISE}"


def _in_four_bit() -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit

    return Linear4bit(WIDTH, INNER, compute_dtype=torch.float32, quant_type="nf4")


KERNELS = (
    Kernel("LoRA linear", lambda _: lora_forward, _is_lora, _lora_differs, _is_known_lora),
    Kernel("RMSNorm", lambda _: norm_forward, _is_norm, _norm_differs, _is_known_norm),
    Kernel("SwiGLU", lambda _: mlp_forward, _is_gated, _mlp_differs, _is_known_mlp, "faster"),
    Kernel("RoPE", _attention_forward, _is_attention, _rotation_differs, _is_known_attention, "all"),
)
