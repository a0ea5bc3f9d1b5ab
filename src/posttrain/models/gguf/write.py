"""A plain model directory -> one GGUF file, by the gguf package's names of tensors and its quantizers."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
from posttrain.models.gguf.changes import Changes, change_of
from posttrain.models.gguf.families import FAMILIES, figures_of
from posttrain.models.gguf.kquants import KINDS, quantize_k
from posttrain.models.gguf.shapes import head_dim, rope_of
from posttrain.models.gguf.spm import STRIPPING
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
    "q6_k": (Kind.Q6_K, Kind.Q6_K, FileType.MOSTLY_Q6_K),
    "q5_k_m": (Kind.Q5_K, Kind.Q6_K, FileType.MOSTLY_Q5_K_M),
    "q4_k_m": (Kind.Q4_K, Kind.Q6_K, FileType.MOSTLY_Q4_K_M),
}
# of rows that do not fill a kind's blocks -> what they are kept in; as llama.cpp does it
NARROW = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
# of these q4_k_m and q5_k_m keep the first and last eighth of the layers, and a third of the others, in more bits
_WEIGHTY = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down|ffn_down_exps)\.weight")
ENDS = ("token_embd.weight", "output.weight")
WHOLE = (".ffn_gate_inp.", "_norm.", "position_embd.")  # llama.cpp reads them in 32 bits
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)")


@dataclass(frozen=True)
class _Form:
    """What becomes of tensors by name: where they go, how they lie there and in how many bits."""

    names: gguf.TensorNameMap
    changes: Changes
    dtype: str
    layers: int

    def place(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"export: llama.cpp's architecture has no place for {name}; --to hf writes any")
        return found

    def kind(self, name: str, tensor: Tensor) -> Kind:
        """Of a place, as it is asked for. Vectors and what llama.cpp reads in 32 bits stay so."""
        if tensor.dim() < 2 or any(part in name for part in WHOLE):
            return Kind.F32
        matrices, ends, _ = DTYPES[self.dtype]
        return ends if name in ENDS or self._is_weighty(name) else matrices

    def _is_weighty(self, name: str) -> bool:
        found, eighth = _WEIGHTY.fullmatch(name), self.layers // 8
        if not found or not self.dtype.endswith("_k_m"):
            return False
        layer = int(found[1])
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


def write_gguf(directory: Path, config: Any, vocabulary: Vocabulary, dtype: str, out: Path, name: str) -> None:
    """directory: of plain safetensors. config: of transformers. dtype: of DTYPES. name: for people.

    Raises UserError for what llama.cpp has no place for; `require_family` says most of it beforehand.
    """
    family = FAMILIES[config.model_type]
    form = _Form(
        gguf.get_tensor_name_map(family.arch, config.num_hidden_layers), family.changes(config), dtype, config.num_hidden_layers
    )
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[family.arch], use_temp_file=True)
    writer.add_name(_name(name, vocabulary))
    writer.add_file_type(DTYPES[dtype][2])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in figures_of(config).items():
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    vocabulary.write(writer)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", 0)
    left = [_add(writer, form, *item) for item in _together(Checkpoint(directory), experts)]
    if kept := [each for each in left if each]:
        say(f"{len(kept)} matrices, such as {kept[0]}: their rows do not fill blocks of {dtype}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str, vocabulary: Vocabulary) -> str:
    """llama.cpp knows by the name alone whether special tokens take the white space after them."""
    strips = vocabulary.pieces is not None and vocabulary.pieces.strips
    for word in STRIPPING:
        name = re.sub(word, "phi", name, flags=re.IGNORECASE)
    return f"{STRIPPING[0]} {name}" if strips else name


def _together(checkpoint: Checkpoint, experts: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, those of all experts of a layer as one, as llama.cpp has them."""
    waiting: dict[str, dict[int, Tensor]] = {}
    for _, tensors in checkpoint.shards():
        for name, tensor in tensors.items():
            if not (found := _EXPERT.fullmatch(name)):
                yield name, tensor
                continue
            layer, number, part = found.groups()
            of_all = waiting.setdefault(f"{layer}.{part}", {})
            of_all[int(number)] = tensor
            if len(of_all) == experts:
                yield f"{layer}.{part}", torch.stack([of_all[i] for i in range(experts)])
                del waiting[f"{layer}.{part}"]
    if waiting:
        raise UserError(f"export: {next(iter(waiting))} is not there of all {experts} experts")


def _add(writer: gguf.GGUFWriter, form: _Form, name: str, tensor: Tensor) -> str:
    """Returns its name, and what it is kept in, where that is not what was asked for."""
    place, values = form.place(name), change_of(name, form.changes).there(tensor.float()).contiguous()
    asked = form.kind(place, values)
    kind = _filled(asked, values.shape[-1])
    coded = quantize_k(values, kind) if kind in KINDS else gguf.quants.quantize(values.numpy(), kind)
    writer.add_tensor(place, coded, raw_dtype=kind)
    return "" if kind == asked else f"{place}, are kept in {kind.name.lower()}"


def _filled(kind: Kind, columns: int) -> Kind:
    """The kind, or that of more bits whose blocks so long rows fill."""
    while columns % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = NARROW.get(kind, Kind.F16)
    return kind


def _rope_factors(config: Any) -> Tensor | None:
    """By what llama.cpp divides each frequency: float32 [head / 2]; None where they are as they are."""
    if rope_of(config)["rope_type"] == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = head_dim(config)
    plain = 1.0 / (rope_of(config)["rope_theta"] ** (torch.arange(0, head, 2).float() / head))
    return (plain / scaled).float()
