"""Fused experts in 4 bits: transformers quantizes linear layers alone, and leaves the experts, most of the model, in 16 bit.

They are quantized one parameter at a time while the model is loaded, and read through a parametrization.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from posttrain.models.layers import is_fused, language_prefix
from posttrain.models.quantization import wide_enough
from posttrain.models.quantization.packed import Packed, read_through

MARK = "with_experts"  # of a BitsAndBytesConfig, that experts are meant too


def with_experts(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """The same, for fused experts too."""
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = ExpertsToo  # which does as the one before for all other configs
    setattr(config, MARK, True)
    return config


class ExpertsToo(Bnb4BitHfQuantizer):
    """As its base, and fused experts of the language model as well where the config says so."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Asked of every weight that is loaded."""
        return self._is_experts(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:  # pyright: ignore
        """Narrow layers too, where the config is ours."""
        kept = super().get_modules_to_not_convert(model, *args, **kwargs)
        if not getattr(self.quantization_config, MARK, False):
            return kept
        linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return kept + [name for name, module in linears if not wide_enough((module.out_features, module.in_features))]

    def _is_experts(self, model: Any, name: str) -> bool:
        if not getattr(self.quantization_config, MARK, False) or not name.startswith(language_prefix(model)):
            return False
        module, own = get_module_from_name(model, name)
        return is_fused(module) and module._parameters[own].ndim == 3 if own in module._parameters else False

    def get_quantize_ops(self) -> Any:
        """For one weight."""
        return _Quantize(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in list(model.modules()):
            for name, parameter in list(module._parameters.items()):
                if (state := getattr(parameter, STATE, None)) is not None:
                    read_through(module, name, In4Bits(state))
        return super()._process_model_after_weight_loading(model, **kwargs)


STATE = "state_of_experts"  # under which a packed parameter carries it until it is read through a parametrization


class _Quantize(ConversionOps):
    def __init__(self, quantizer: ExpertsToo, others: ConversionOps) -> None:
        self.quantizer, self.others = quantizer, others

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One weight, under its name."""
        from bitsandbytes.functional import quantize_4bit

        config: Any = self.quantizer.quantization_config
        found: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if not self.quantizer._is_experts(kwargs["model"], name):
                return self.others.convert(input_dict, *args, **kwargs)
            weight = value[0] if isinstance(value, list) else value
            if weight.is_meta:  # which is not loaded (checkpoints/part.py)
                found[name] = weight
                continue
            packed, state = quantize_4bit(
                weight.contiguous(), compress_statistics=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type
            )
            found[name] = nn.Parameter(packed, requires_grad=False)
            setattr(found[name], STATE, state)
        return found


class In4Bits(Packed):
    """Of bitsandbytes."""

    def __init__(self, state: Any) -> None:
        super().__init__(state.shape, state.dtype)
        self.state = state

    def decode(self, packed: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(packed, self.state).to(self.compute_dtype)
