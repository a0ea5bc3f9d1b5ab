"""The formats of quantized checkpoints: which tensors belong to a weight, and what the weight is.

config.json names the format (`quantization_config`). All that is not listed here is refused; no library of a format's own is
needed to read it, but for bitsandbytes'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.models.checkpoints import formulas


class Parts(Protocol):
    """The tensors that a weight is kept in, by their short names."""

    def __contains__(self, part: object) -> bool: ...

    def shape(self, part: str) -> tuple[int, ...]:
        """Read from the file's header."""
        ...

    def dtype(self, part: str) -> str:
        """As safetensors calls it, such as U8."""
        ...

    def tensor(self, part: str) -> Tensor:
        """Read from the file."""
        ...


class Layout(NamedTuple):
    """How the names of a weight's tensors end: the one that it is recognised by, what takes its place in the model, the parts
    beside it, and those that may be missing."""

    main: str
    plain: str
    parts: dict[str, str]
    optional: dict[str, str] = {}  # noqa: RUF012 (never changed)


@dataclass(frozen=True)
class Format:
    """What config.json says of it. name: in words.

    stands_for: the `quant.method` that makes the same layers, where a frozen base is computed with as it lies there. dropped:
    endings of tensors that are no part of a weight: scales of activations, which are computed in 16 bit here.
    """

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    layouts: ClassVar[tuple[Layout, ...]] = ()
    dropped: ClassVar[tuple[str, ...]] = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
    stands_for: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        """As it is called in messages and in the manifest."""
        return str(self.settings.get("quant_method"))

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Of the weight, without reading it."""
        return parts.shape("main")

    def elements(self, parts: Parts) -> formulas.Elements:
        """The weight number by number. Asked of formats that are `by_numbers`."""
        raise NotImplementedError

    def exact(self, parts: Parts) -> Tensor:
        """The weight, in float32."""
        return self.elements(parts).meant()

    def weight(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The weight, rounded once."""
        return self.exact(parts).to(dtype)

    @property
    def by_numbers(self) -> bool:
        """Can it be held in memory as codes and scales, and be dequantized for each product (held.py)?"""
        return self.stands_for is None

    def keeps(self, quant: str) -> bool:
        """Is a base used as it is, under this `quant.method`?"""
        return quant in ("none", self.stands_for)

    @property
    def is_written(self) -> bool:
        """Can weights be put into it again, by `pack`?"""
        return False

    def layers(self) -> dict[str, Any]:
        """The settings of the quantizer that it stands for."""
        return {"method": self.stands_for or "none"}

    def pack(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that the weight called `name` is kept in, by their names."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UserError for settings of the format that cannot be read."""


class Fp8(Format):
    """E4M3 with scales of blocks (DeepSeek-V3, MiniMax-M2), of rows or of whole tensors; MXFP8; experts in FP4 beside them."""

    layouts = (
        Layout("", "", {"scale": "_scale_inv"}),
        Layout(".weight", ".weight", {"scale": ".weight_scale"}),
        Layout(".weight", ".weight", {"scale": ".scale"}),
        Layout(".weight", ".weight", {"scale": ".qscale_weight"}),
    )
    dropped = (*Format.dropped, ".input_scale_ub", ".qscale_act")

    def shape(self, parts: Parts) -> tuple[int, ...]:
        found = parts.shape("main")
        return (*found[:-1], 2 * found[-1]) if parts.dtype("main") in ("I8", "U8") else found

    def elements(self, parts: Parts) -> formulas.Elements:
        main = parts.tensor("main")
        value = formulas.nibbles(main) if main.dtype in (torch.int8, torch.uint8) else main
        return formulas.scaled(value, parts.tensor("scale"), self.settings.get("weight_block_size"))

    @property
    def is_written(self) -> bool:
        return self.name == "fp8" and self.settings.get("scale_fmt") in (None, "float")

    def pack(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        block = self.settings.get("weight_block_size") or tuple(weight.shape)
        value, scale = formulas.to_fp8(weight.float(), block)
        return {name: value, f"{name}_scale_inv": scale if scale.numel() > 1 else scale.reshape(())}


class Mxfp4(Format):
    """FP4 in groups of 32 with an exponent each, over the fused experts of gpt-oss, which keep their weights as [out, in]."""

    layouts = (Layout("_blocks", "", {"scales": "_scales"}),)

    def shape(self, parts: Parts) -> tuple[int, ...]:
        *first, rows, groups, size = parts.shape("main")
        return (*first, 2 * groups * size, rows)

    def elements(self, parts: Parts) -> formulas.Elements:
        return formulas.mxfp4(parts.tensor("main"), parts.tensor("scales")).transposed

    def weight(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        experts = zip(parts.tensor("main"), parts.tensor("scales"), strict=True)  # one at a time: a layer's are gigabytes
        return torch.stack([formulas.mxfp4(blocks, scales).transposed.meant().to(dtype) for blocks, scales in experts])


def _of_bitsandbytes(kind: str) -> Layout:
    constants = {part: f".weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    optional = {part: constants.pop(part) for part in ("nested_absmax", "nested_quant_map")}
    return Layout(".weight", ".weight", constants | {"state": f".weight.quant_state.bitsandbytes__{kind}"}, optional)


class Bnb4(Format):
    """NF4 or FP4 of bitsandbytes, with or without double quantization."""

    stands_for = "nf4"
    layouts = (_of_bitsandbytes("nf4"), _of_bitsandbytes("fp4"))

    @property
    def name(self) -> str:
        return "bnb-4bit"

    def keeps(self, quant: str) -> bool:
        return quant in ("none", self._kind)

    @property
    def _kind(self) -> str:
        return self.settings.get("bnb_4bit_quant_type", "fp4")

    @property
    def is_written(self) -> bool:
        return True

    def layers(self) -> dict[str, Any]:
        double = bool(self.settings.get("bnb_4bit_use_double_quant"))
        return {"method": "nf4", "double_quant": double, "compute_dtype": "bfloat16", "dense_layers": 0}

    def pack(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        double = bool(self.settings.get("bnb_4bit_use_double_quant"))
        words, state = quantize_4bit(weight, quant_type=self._kind, compress_statistics=double)
        constants = state.as_dict(packed=True)
        return {name: words} | {f"{name}.{part}": value for part, value in constants.items()}

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return tuple(self._state(parts).shape)

    def exact(self, parts: Parts) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = self._state(parts)
        return dequantize_4bit(parts.tensor("main"), state).reshape(state.shape).float()

    def _state(self, parts: Parts) -> Any:
        from bitsandbytes.functional import QuantState

        names = {"absmax": "absmax", "quant_map": "quant_map"} | {
            n: n for n in ("nested_absmax", "nested_quant_map") if n in parts
        }
        found = {key: parts.tensor(part) for key, part in names.items()}
        return QuantState.from_dict(
            found | {f"quant_state.bitsandbytes__{self._kind}": parts.tensor("state")}, torch.device("cpu")
        )


class Bnb8(Format):
    """LLM.int8() of bitsandbytes: a byte a number, and a scale a row, of which 127 is the largest."""

    stands_for = "int8"
    layouts = (Layout(".weight", ".weight", {"scale": ".SCB"}),)
    dropped = (".weight_format",)

    @property
    def name(self) -> str:
        return "bnb-8bit"

    def exact(self, parts: Parts) -> Tensor:
        return parts.tensor("main").float() * (parts.tensor("scale").float() / 127)[:, None]

    @property
    def is_written(self) -> bool:
        return True

    def layers(self) -> dict[str, Any]:
        return {"method": "int8", "threshold": float(self.settings.get("llm_int8_threshold", 6.0))}

    def pack(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.float().abs().amax(1)
        value = (weight.float() * (127 / scale.clamp(min=1e-30))[:, None]).round().to(torch.int8)
        stem = name.removesuffix(".weight")
        return {name: value, f"{stem}.SCB": scale, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}


class CompressedTensors(Format):
    """llm-compressor's: FP8 and INT8, integers packed into words, NVFP4 and MXFP4."""

    layouts = (
        Layout(
            ".weight_packed", ".weight", {"scale": ".weight_scale"},
            {"global": ".weight_global_scale", "shape": ".weight_shape", "zero": ".weight_zero_point", "group": ".weight_g_idx"},
        ),
        Layout(".weight", ".weight", {"scale": ".weight_scale"}, {"zero": ".weight_zero_point"}),
    )  # fmt: skip
    dropped = (*Format.dropped, ".input_zero_point", ".input_global_scale", ".q_scale")

    @property
    def name(self) -> str:
        return f"compressed-tensors ({self.settings.get('format')})"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        if "shape" in parts:
            return tuple(parts.tensor("shape").tolist())
        rows, columns = parts.shape("main")
        return (rows, 2 * columns) if parts.dtype("main") == "U8" else (rows, columns)

    def elements(self, parts: Parts) -> formulas.Elements:
        main, scale = parts.tensor("main"), parts.tensor("scale")
        zero = parts.tensor("zero") if "zero" in parts else None
        if main.dtype == torch.uint8:
            scale = formulas.exponents(scale)
            return formulas.scaled(formulas.nibbles(main), scale / parts.tensor("global").float() if "global" in parts else scale)
        if main.dtype != torch.int32:
            return formulas.scaled(main, scale, self._block(), zero)
        rows, columns = self.shape(parts)
        bits = self._bits(columns, main.shape[1])
        codes = formulas.unpacked(main, bits, 1)[:, :columns].to(torch.uint8)
        if zero is not None and zero.dtype == torch.int32:
            zero = formulas.unpacked(zero, bits, 0)[:rows] - 2 ** (bits - 1)
        if "group" in parts:
            index = parts.tensor("group").long()
            scale, zero = scale[:, index], zero if zero is None else zero[:, index]
        return formulas.of_codes(f"offset {bits}", codes, scale, None, zero)

    def check(self) -> None:
        odd = [bits for bits in self._all_bits() if 8 % bits]
        if odd and self.settings.get("format") == "pack-quantized":
            raise UserError(f"model.name: its weights are in {odd[0]} bits of {self.name}, which cannot be read here")

    def _all_bits(self) -> list[int]:
        groups = (self.settings.get("config_groups") or {}).values()
        return sorted({group["weights"]["num_bits"] for group in groups if group.get("weights")})

    def _bits(self, columns: int, words: int) -> int:
        """Of the groups in config.json the one whose numbers fill just so many words."""
        return next(bits for bits in self._all_bits() if math.ceil(columns / (32 // bits)) == words)

    def _block(self) -> list[int] | None:
        groups = self.settings.get("config_groups", {}).values()
        return next((g["weights"]["block_structure"] for g in groups if (g.get("weights") or {}).get("block_structure")), None)


class ModelOpt(Format):
    """NVIDIA's: NVFP4 with a scale a group of 16 and one of the tensor, and FP8."""

    layouts = (Layout(".weight", ".weight", {"scale": ".weight_scale"}, {"second": ".weight_scale_2"}),)

    @property
    def name(self) -> str:
        return f"modelopt ({self.settings.get('quant_algo')})"

    def shape(self, parts: Parts) -> tuple[int, ...]:
        *first, columns = parts.shape("main")
        return (*first, 2 * columns if parts.dtype("main") == "U8" else columns)

    def elements(self, parts: Parts) -> formulas.Elements:
        main, scale = parts.tensor("main"), formulas.exponents(parts.tensor("scale"))
        if "second" in parts:
            scale = scale * parts.tensor("second").float()
        return formulas.scaled(formulas.nibbles(main) if main.dtype == torch.uint8 else main, scale)


class Gptq(Format):
    """Integers packed along the inputs, with scales and zeros of groups of inputs (Frantar et al. 2022, arXiv 2210.17323)."""

    layouts = (Layout(".qweight", ".weight", {"zeros": ".qzeros", "scales": ".scales"}, {"group": ".g_idx"}),)

    def check(self) -> None:
        if self.settings.get("bits") not in (2, 4, 8):
            raise UserError(f"model.name: its weights are in {self.settings.get('bits')} bits of GPTQ, which cannot be read here")

    def shape(self, parts: Parts) -> tuple[int, ...]:
        words, rows = parts.shape("main")
        return rows, words * 32 // self.settings["bits"]

    def elements(self, parts: Parts) -> formulas.Elements:
        columns, bits = self.shape(parts)[1], self.settings["bits"]
        groups = parts.shape("scales")[0]
        group = parts.tensor("group") if "group" in parts else torch.arange(columns) // (columns // groups)
        less = self.settings.get("checkpoint_format", "gptq") != "gptq_v2"
        return formulas.gptq(parts.tensor("main"), parts.tensor("zeros"), parts.tensor("scales"), group, bits, less)


class Awq(Format):
    """Integers packed along the outputs, interleaved (Lin et al. 2023, arXiv 2306.00978)."""

    layouts = (Layout(".qweight", ".weight", {"zeros": ".qzeros", "scales": ".scales"}),)

    def check(self) -> None:
        bits, version = self.settings.get("bits"), str(self.settings.get("version", "gemm")).lower()
        if (bits, version) != (4, "gemm"):
            raise UserError(f"model.name: its weights are in AWQ of {bits} bits, version {version}, which cannot be read here")

    def shape(self, parts: Parts) -> tuple[int, ...]:
        columns, words = parts.shape("main")
        return 8 * words, columns

    def elements(self, parts: Parts) -> formulas.Elements:
        return formulas.awq(parts.tensor("main"), parts.tensor("zeros"), parts.tensor("scales"))


FORMATS: dict[str, type[Format]] = {
    "fp8": Fp8, "mxfp8": Fp8, "fbgemm_fp8": Fp8, "mxfp4": Mxfp4, "compressed-tensors": CompressedTensors, "modelopt": ModelOpt,
    "gptq": Gptq, "awq": Awq,
}  # fmt: skip


def format_of(config: dict[str, Any]) -> Format | None:
    """Of a config.json; None for weights in 16 or 32 bit. Raises UserError for a format that cannot be read."""
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not settings:
        return None
    method = str(settings.get("quant_method"))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        found: Format = Bnb4(settings) if settings.get("load_in_4bit") else Bnb8(settings)
    elif method in FORMATS:
        found = FORMATS[method](settings)
    else:
        known = ", ".join(sorted({"bitsandbytes", *FORMATS}))
        raise UserError(f"model.name: its weights are in the format '{method}', which cannot be read here (there are: {known})")
    found.check()
    return found
