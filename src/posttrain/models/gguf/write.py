"""A plain model directory -> one GGUF file, by the gguf package's names of tensors and its quantizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType
from torch import Tensor

from posttrain.console import say
from posttrain.errors import UserError
from posttrain.models.checkpoints.files import Checkpoint
from posttrain.models.gguf.vocabulary import Vocabulary

# --dtype -> of matrices, of the embedding and the head, and the file's own mark
DTYPES = {
    "f32": (Kind.F32, Kind.F32, FileType.ALL_F32),
    "f16": (Kind.F16, Kind.F16, FileType.MOSTLY_F16),
    "bf16": (Kind.BF16, Kind.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, Kind.Q8_0, FileType.MOSTLY_Q8_0),
    "q5_1": (Kind.Q5_1, Kind.Q8_0, FileType.MOSTLY_Q5_1),
    "q5_0": (Kind.Q5_0, Kind.Q8_0, FileType.MOSTLY_Q5_0),
    "q4_1": (Kind.Q4_1, Kind.Q8_0, FileType.MOSTLY_Q4_1),
    "q4_0": (Kind.Q4_0, Kind.Q8_0, FileType.MOSTLY_Q4_0),
}
# model_type -> llama.cpp's architecture, and whether it wants the rows of q and k in the order of its own rope
FAMILIES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
ENDS = ("token_embd.weight", "output.weight")


def require_family(config: Any) -> None:
    """Raises UserError for a model of transformers' config that is not written. Loads nothing."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"export: no GGUF is written of {config.model_type} models (there are: {', '.join(FAMILIES)}); --to hf writes any, "
            "which llama.cpp's own converter reads"
        )
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"export: no GGUF is written of models with {rope['rope_type']} rope (there are: default, llama3)")
    if getattr(config, "use_sliding_window", False):
        raise UserError("export: no GGUF is written of models with a sliding window; --to hf writes any")


@dataclass(frozen=True)
class _Form:
    """What becomes of tensors by name: where they go, in which order of rows and in how many bits."""

    names: gguf.TensorNameMap
    heads: dict[str, int]  # ending of a name whose rows are put into llama.cpp's order -> heads
    dtype: str

    def place(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"export: llama.cpp's architecture has no place for {name}; --to hf writes any")
        return found

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Rope of llama.cpp turns neighbours, that of transformers the halves of a head."""
        count = next((n for end, n in self.heads.items() if f".{end}." in name), None)
        if count is None:
            return tensor
        return tensor.view(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def kind(self, name: str, tensor: Tensor) -> Kind:
        """Vectors stay in 32 bits; a matrix whose rows do not fill the quantizer's blocks is kept in f16."""
        if tensor.dim() < 2:
            return Kind.F32
        matrices, ends, _ = DTYPES[self.dtype]
        kind = ends if name in ENDS else matrices
        return Kind.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def write_gguf(directory: Path, config: Any, vocabulary: Vocabulary, dtype: str, out: Path, name: str) -> None:
    """directory: of plain safetensors. config: of transformers. dtype: of DTYPES. name: for people.

    Raises UserError for what llama.cpp has no place for; `require_family` says most of it beforehand.
    """
    arch, permutes = FAMILIES[config.model_type]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if permutes else {}
    form = _Form(gguf.get_tensor_name_map(arch, config.num_hidden_layers), heads, dtype)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    writer.add_name(name)
    writer.add_file_type(DTYPES[dtype][2])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    vocabulary.write(writer)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    left = [_add(writer, form, *item) for _, tensors in Checkpoint(directory).shards() for item in tensors.items()]
    if kept := [each for each in left if each]:
        say(f"{len(kept)} matrices, such as {kept[0]}, stay in f16: their rows do not fill blocks of {dtype}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, form: _Form, name: str, tensor: Tensor) -> str:
    """Returns the name where it is kept in more bits than was asked for."""
    place, kind = form.place(name), form.kind(form.place(name), tensor)
    values = form.rows(name, tensor.float()).contiguous().numpy()
    writer.add_tensor(place, gguf.quants.quantize(values, kind), raw_dtype=kind)
    return place if tensor.dim() > 1 and kind == Kind.F16 and form.dtype not in ("f16",) else ""


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    head = _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])


def _rope(config: Any) -> dict[str, Any]:
    """transformers before 5 kept it in two keys."""
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    found.setdefault("rope_type", "default")
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return found


def _rope_factors(config: Any) -> Tensor | None:
    """By what llama.cpp divides each frequency: float32 [head / 2]; None where they are as they are."""
    if _rope(config)["rope_type"] == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = _head_dim(config)
    plain = 1.0 / (_rope(config)["rope_theta"] ** (torch.arange(0, head, 2).float() / head))
    return (plain / scaled).float()
