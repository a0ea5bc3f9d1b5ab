"""A checkpoint's own format kept in memory as codes and scales; a weight is made of them for each product.

transformers moves weights about while it loads them: it stacks experts, joins projections, transposes. So each number of a
quantized weight goes through it as 64 bits that carry its code, zero and scale, and is taken apart where it has arrived.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from posttrain.errors import UserError
from posttrain.models.checkpoints.formulas import TABLES, Elements, nibbles
from posttrain.models.layers import is_fused
from posttrain.models.quantization.packed import Packed, read_through

NAME = "posttrain_held"  # under which transformers finds the quantizer
ORDER = tuple(TABLES)
ZERO = 1 << 15  # added to a zero, which may be below 0


class Carrier(Tensor):
    """int64 of a weight's shape: from the lowest bits, the code (8), the zero (16), the table (8), the scale (32)."""

    def to(self, *_: Any, device: Any = None, **__: Any) -> Tensor:  # pyright: ignore
        """To another place, never in another format."""
        return super().to(device=device)


def carrier(elements: Elements) -> Carrier:
    """What carries a weight through the loading."""
    zero = torch.zeros((), dtype=torch.int64) if elements.zero is None else elements.zero.long()
    scale = elements.scale.float().contiguous().view(torch.int32).long() << 32
    rest = elements.codes.long() | ((zero + ZERO) << 8) | (ORDER.index(elements.kind) << 24)
    return (rest | scale).as_subclass(Carrier)


def elements_of(found: Tensor) -> Elements:
    """What a carrier carries; scale and zero are of the whole shape."""
    bits = found.as_subclass(Tensor)
    scale = (bits >> 32).to(torch.int32).view(torch.float32)
    zero = ((bits >> 8) & 0xFFFF) - ZERO
    return Elements(
        ORDER[int(bits.flatten()[0] >> 24) & 0xFF], (bits & 0xFF).to(torch.uint8), scale, zero if zero.any() else None
    )


class Grid(nn.Module):
    """Numbers that belong to rows and columns of a weight, each row and column of them once.

    cells: [..., rows, columns]. rows, columns: to which of them each row and column of the weight belongs.
    """

    cells: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, values: Tensor) -> None:
        """Of numbers for the whole weight."""
        super().__init__()
        cells, rows = _each_once(values, values.dim() - 2)
        cells, columns = _each_once(cells, values.dim() - 1)
        for name, value in (("cells", _narrowest(cells)), ("rows", rows.int()), ("columns", columns.int())):
            self.register_buffer(name, value, persistent=False)

    def spread(self, expert: int | None) -> Tensor:
        """To each number of the weight, or of an expert's, in float32."""
        cells = (self.cells if expert is None else self.cells[expert]).float()
        for axis, index in ((-2, self.rows), (-1, self.columns)):
            if cells.shape[axis] > 1:
                cells = cells.index_select(axis, index)
        return cells


def _each_once(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The slices along an axis that differ, and which of them each one is; blocks first, for few formats mix their order."""
    found, index = torch.unique_consecutive(values, return_inverse=True, dim=axis)
    if found.shape[axis] > values.shape[axis] // 2:
        found, index = torch.unique(values, return_inverse=True, dim=axis)
    return found, index


def _narrowest(values: Tensor) -> Tensor:
    """In the format of the fewest bytes that holds them exactly."""
    formats = (torch.bfloat16, torch.float16) if values.is_floating_point() else (torch.uint8, torch.int32)
    return next(
        (cut for dtype in formats if torch.equal((cut := values.to(dtype)).to(values.dtype), values)), values
    ).contiguous()


class Held(Packed):
    """A weight's codes, two in a byte where there are no more than sixteen, with its scales and zeros."""

    def __init__(self, elements: Elements, dtype: torch.dtype) -> None:
        super().__init__(elements.codes.shape, dtype)
        self.kind = elements.kind
        self.in_halves = len(TABLES[self.kind]) <= 16 and self.shape[-1] % 2 == 0
        self.scale, self.zero = Grid(elements.scale), None if elements.zero is None else Grid(elements.zero)

    def pack(self, codes: Tensor) -> Tensor:
        """As the parameter holds them."""
        return codes[..., 0::2] | (codes[..., 1::2] << 4) if self.in_halves else codes.contiguous()

    def decode(self, packed: Tensor) -> Tensor:
        if len(self.shape) == 2:
            return self._decode(packed, None)
        weight = torch.empty(self.shape, dtype=self.compute_dtype, device=packed.device)
        for expert, codes in enumerate(packed):  # one at a time: on the way it takes some four times as much
            weight[expert] = self._decode(codes, expert)
        return weight

    def _decode(self, packed: Tensor, expert: int | None) -> Tensor:
        zero = None if self.zero is None else self.zero.spread(expert)
        codes = nibbles(packed) if self.in_halves else packed
        return Elements(self.kind, codes, self.scale.spread(expert), zero).meant().to(self.compute_dtype)

    @property
    def constants(self) -> int:
        """Bytes of scales and zeros."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class _Config(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = NAME


class _Quantizer(HfQuantizer):
    """For transformers' loader: what becomes of weights that arrive as carriers."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options | {"pre_quantized": False})  # each weight goes by _TakeApart
        self.packed: dict[str, Held] = {}
        self.dequantized: list[str] = []
        self.partly: list[str] = []
        self.mismatched: list[tuple[str, torch.Size, torch.Size]] = []

    def param_needs_quantization(self, *_: Any, **__: Any) -> bool:
        return True  # which one is carried is seen once it has arrived

    def get_quantize_ops(self) -> Any:
        return _TakeApart(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for path, module in list(model.named_modules()):
            for own in list(module._parameters):  # in the order of the class, which adapters are put on in
                if held := self.packed.get(f"{path}.{own}"):
                    read_through(module, own, held)
        return model

    def is_serializable(self, *_: Any) -> Any:
        return False

    @property
    def is_trainable(self) -> Any:
        return True


class _TakeApart(ConversionOps):
    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **options: Any) -> dict[str, Tensor]:  # pyright: ignore
        """Weights under their names in the model."""
        return {name: self._one(options["model"], name, _first(value)) for name, value in input_dict.items()}

    def _one(self, model: Any, name: str, value: Tensor) -> Tensor:
        module, own = get_module_from_name(model, name)
        wanted = getattr(module, own)
        if value.shape != wanted.shape:  # transformers leaves the shapes to a quantizer
            self.quantizer.mismatched.append((name, value.shape, wanted.shape))
        if not isinstance(value, Carrier):
            return value
        if value.dtype != torch.int64:  # joined with plain numbers; an error here would reach nobody
            self.quantizer.partly.append(name)
            return value.as_subclass(Tensor)
        elements = elements_of(value)
        if _can_be_held(model, module, own) and value.shape == wanted.shape:
            held = Held(elements, wanted.dtype)
            codes = held.pack(elements.codes)
            if codes.numel() + held.constants < value.numel() * wanted.element_size():
                self.quantizer.packed[name] = held
                return nn.Parameter(codes, requires_grad=False)
        self.quantizer.dequantized.append(name)
        return elements.meant().to(wanted.dtype)


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _can_be_held(model: Any, module: nn.Module, name: str) -> bool:
    """Linear layers but for the head, whose weight is asked for by itself, and fused experts."""
    if type(module).forward is nn.Linear.forward:
        return name == "weight" and module is not model.get_output_embeddings()
    return is_fused(module) and module._parameters[name].ndim == 3  # pyright: ignore


def load_as_held(config: Any) -> None:
    """A model of `config` is then loaded from carriers; weight by weight, for a carrier is four times as large as its weight."""
    AUTO_QUANTIZER_MAPPING[NAME], AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = _Quantizer, _Config
    config.quantization_config = {"quant_method": NAME}


def settle_held(model: Any, info: dict[str, Any]) -> list[str]:
    """Make a loaded model one that no library takes for quantized. Returns the weights that had to be dequantized.

    info: what transformers says of keys; those of another shape are added. Raises UserError.
    """
    quantizer: _Quantizer = model.hf_quantizer
    if quantizer.partly:
        raise UserError(f"model.name: only a part of {quantizer.partly[0]} is quantized in its checkpoint; say quant=dequantize")
    info["mismatched_keys"] = quantizer.mismatched
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    return quantizer.dequantized
