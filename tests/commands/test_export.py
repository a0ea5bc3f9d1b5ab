"""Exports: a file that others load is the live model, within a budget, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import posttrain
from posttrain.commands.export.export import export_run
from posttrain.commands.export.target import TARGETS
from posttrain.commands.export.targets._serving import SHAPES, modelfile, serve_command
from posttrain.errors import RunError, UserError
from posttrain.models.builtin import tiny_tokenizer
from posttrain.models.language.loading import load_model
from posttrain.models.peft.merge import Adapter
from posttrain.runs.artifact import open_artifact

WORDS = (
    "model=tiny", "train.max_steps=3", "train.batch_size=2", "data.max_rows=30", "data.eval_rows=4", "eval.sets=null",
    "optim.lr=0.02", "model.dtype=float32",
)  # fmt: skip
IDS = torch.randint(5, 50, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "mine"
    posttrain.run("sft", *WORDS, "peft=lora", "peft.r=4", f"run.dir={folder}")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_gguf_is_the_live_model(run: Path, tmp_path: Path) -> None:
    place = export_run(run, "gguf", tmp_path / "out", "f32", 1e-4)
    assert sorted(p.name for p in place.iterdir()) == ["export.json", "mine-f32.gguf"]
    back = AutoModelForCausalLM.from_pretrained(place, gguf_file="mine-f32.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(back), logits(load_model(run).model), rtol=0, atol=1e-4)
    figures = json.loads((place / "export.json").read_text())
    assert figures["kl"] < 1e-6 and figures["top1"] > 0.999 and figures["greedy_same"] == figures["greedy"] == 4
    assert figures["ends"] == [2] and figures["dtype"] == "f32"
    words = AutoTokenizer.from_pretrained(place, gguf_file="mine-f32.gguf")
    assert words("the value of a list").input_ids == tiny_tokenizer()("the value of a list").input_ids


def test_beyond_the_budget_nothing_is_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"in q4_0 is .* nats a token .* more than --max-kl 1e-05; nothing was written"):
        export_run(run, "gguf", tmp_path / "out", "q4_0", 1e-5)
    assert list(tmp_path.iterdir()) == []


def test_hf_is_the_merged_model_in_the_dtype_asked_for(run: Path, tmp_path: Path) -> None:
    place = export_run(run, "hf", tmp_path / "out", "bf16", 0.05)
    back = AutoModelForCausalLM.from_pretrained(place)
    assert back.dtype == torch.bfloat16 and (place / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_hf_by_bitsandbytes_is_what_plain_transformers_loads(run: Path, tmp_path: Path, dtype: str) -> None:
    place = export_run(run, "hf", tmp_path / "out", dtype, 1.0)
    back = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    kinds = {type(layer).__name__ for layer in back.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[dtype] in kinds
    live = logits(load_model(run).model).log_softmax(-1)
    kl = (live.exp() * (live - logits(back).float().log_softmax(-1))).sum(-1).mean()
    figures = json.loads((place / "export.json").read_text())
    assert 0 < kl < 1.0 and 0 < figures["kl"] < 1.0 and figures["dtype"] == dtype
    assert AutoTokenizer.from_pretrained(place).chat_template and (place / "generation_config.json").is_file()


@pytest.mark.slow
def test_gptq_by_llm_compressor_is_what_plain_transformers_loads(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed (pip install llmcompressor)")
    place = export_run(run, "hf", tmp_path / "out", "gptq", 1.0)
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (config["quant_method"], weights["num_bits"], weights["group_size"]) == ("compressed-tensors", 4, 32)
    assert "model.layers.0.mlp.down_proj" in config["ignore"]  # 344 columns
    back = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    live = logits(load_model(run).model).log_softmax(-1)
    kl = (live.exp() * (live - logits(back).float().log_softmax(-1))).sum(-1).mean()
    assert 0 < kl < 1e-2 and 0 < json.loads((place / "export.json").read_text())["kl"] < 1e-2
    with pytest.raises(UserError, match="llm-compressor makes awq on a GPU alone"):
        export_run(run, "hf", tmp_path / "other", "awq", 1.0)


def mlx_modules() -> Any:
    return pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'mlx[cpu]' mlx-lm): MLX reads nothing here")


def test_mlx_adapter_by_its_keys(run: Path, tmp_path: Path) -> None:
    place = export_run(run, "mlx", tmp_path / "out", None, 0.05)
    assert sorted(file.name for file in place.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    tensors, config = load_file(place / "adapters.safetensors"), json.loads((place / "adapter_config.json").read_text())
    assert config["lora_parameters"] | {"keys": None} == {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": None}
    adapter = Adapter(run / "adapter", "run")
    assert {f"{name}.lora_{half}" for name in adapter.modules for half in "ab"} == set(tensors)
    assert {name.split(".", 3)[3] for name in adapter.modules} == set(config["lora_parameters"]["keys"])
    for name in adapter.modules:
        change = (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
        torch.testing.assert_close(change, adapter.factors(name).change(), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_mlx_quantized_is_held_to_the_budget(run: Path, tmp_path: Path) -> None:
    place = export_run(run, "mlx", tmp_path / "out", "q4", 1.0)
    config = json.loads((place / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    names = load_file(place / "model.safetensors")
    assert names["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint32
    assert 0 < json.loads((place / "export.json").read_text())["kl"] < 1.0 and (place / "tokenizer.json").is_file()
    with pytest.raises(RunError, match=r"the file in q4 is .* more than --max-kl 1e-06; nothing was written"):
        export_run(run, "mlx", tmp_path / "other", "q4", 1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "f32", "q4", "q8"])
def test_mlx_lm_reads_the_same_model(run: Path, tmp_path: Path, dtype: str | None) -> None:
    mlx_lm = mlx_modules()
    import mlx.core as mx  # pyright: ignore[reportMissingImports]

    place = export_run(run, "mlx", tmp_path / "out", dtype, 1.0)
    base = open_artifact(run, "run").source
    model, words = mlx_lm.load(*((base,) if dtype is None else (str(place),)), adapter_path=str(place) if dtype is None else None)
    found = torch.tensor(model(mx.array(IDS.tolist())).astype(mx.float32).tolist())
    live = logits(load_model(run).model).log_softmax(-1)
    kl = (live.exp() * (live - found.log_softmax(-1))).sum(-1).mean()
    assert abs(kl) < {None: 1e-6, "f32": 1e-6, "q8": 1e-4, "q4": 1e-1}[dtype]
    assert words.encode("the value of a list") == tiny_tokenizer()("the value of a list").input_ids


def test_ollama_gets_template_and_stops(run: Path, tmp_path: Path) -> None:
    place = export_run(run, "ollama", tmp_path / "out", "q8_0", 0.05)
    text = (place / "Modelfile").read_text()
    assert text.startswith("FROM ./mine-q8_0.gguf\n") and text.endswith('PARAMETER stop "<|im_end|>"\n')
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = tiny_tokenizer().apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert as_ollama(text, talk) == expected


def as_ollama(text: str, talk: list[dict[str, str]]) -> str:
    """The prompt that Go's templates make of the two forms that are written."""
    found = re.search(r'TEMPLATE """\{\{- range \.Messages \}\}(.*?)(?:\n\{\{ end \}\}|\{\{- end \}\})(.*?)"""', text, re.S)
    assert found
    turn = found[1] + ("\n" if "\n{{ end }}" in text else "")
    written = "".join(turn.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in talk)
    return written + found[2]


@pytest.mark.parametrize("name", list(SHAPES))
def test_known_shapes_of_chat_templates(name: str) -> None:
    turn, answer = SHAPES[name]
    loop = turn.replace("{role}", "{{ m['role'] }}").replace("{content}", "{{ m['content'] }}")
    tokenizer = tiny_tokenizer()
    default = turn.format(role="system", content="You help.")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}" + default + "{% endif %}"
        "{% for m in messages %}" + loop + "{% endfor %}{{ '" + answer.replace("\n", "\\n") + "' }}"
    )
    text = modelfile("m.gguf", tokenizer, [2, 0])
    talk = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Hi"}]
    assert as_ollama(text, talk) == "".join(turn.format(**m) for m in talk) + answer
    assert 'SYSTEM """You help."""' in text and 'PARAMETER stop "<|endoftext|>"\n' in text
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer, [2])


def test_vllm_gets_the_adapter_and_a_command(run: Path, tmp_path: Path) -> None:
    place = export_run(run, "vllm", tmp_path / "out", None, 0.05)
    assert (place / "adapter" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    command = (place / "serve.sh").read_text().splitlines()[-1]
    assert command == (
        f"vllm serve {open_artifact(run, 'run').source} --tokenizer ./adapter --generation-config ./adapter "
        "--enable-lora --max-lora-rank 8 "
        "--lora-modules mine=./adapter"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "PREFIX_TUNING"}, "no LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "several scales"),
        ({"r": 1024, "lora_alpha": 1024}, "rank 512 at most"),
    ],
)
def test_vllm_refuses_what_it_would_not_serve(run: Path, tmp_path: Path, change: dict[str, Any], why: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    out = "it cannot be merged" if {"peft_type", "modules_to_save"} & set(change) else "--to hf"
    with pytest.raises(UserError, match=f"{why}.*{out}"):
        serve_command(open_artifact(copy, "run"))


@pytest.mark.parametrize(
    ("to", "said", "dtype"),
    [
        ("gguf", "Q8_0", "q8_0"),
        ("gguf", "float16", "f16"),
        ("hf", "fp32", "f32"),
        ("hf", "BFloat16", "bf16"),
        ("vllm", None, None),
    ],
)
def test_other_spellings_are_the_same_dtype(to: str, said: str | None, dtype: str | None) -> None:
    assert TARGETS.get(to).dtype_of(said) == dtype


def test_a_place_where_nothing_can_be_made_is_said_before_a_model_loads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.commands.export.held.load_model", None)
    monkeypatch.setattr("posttrain.commands.merge.load_model", None)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("kept")
    for to in ("gguf", "hf", "vllm"):
        with pytest.raises(UserError, match=r"--out: .*link exists already"):
            export_run(run, to, tmp_path / "link", None, 0.05)
        with pytest.raises(
            UserError, match=r"--out: .*below cannot be made \(Not a directory|--out: .*below cannot be made \(File exists"
        ):
            export_run(run, to, tmp_path / "file" / "below", None, 0.05)
        for budget in (-1.0, float("nan")):
            with pytest.raises(UserError, match=r"--max-kl: .* is no distance"):
                export_run(run, to, tmp_path / "out", None, budget)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"] and (tmp_path / "file").read_text() == "kept"


def test_bad_words_are_one_line_before_a_model_loads(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.commands.export.held.load_model", None)
    monkeypatch.setattr("posttrain.commands.merge.load_model", None)
    for to, dtype, why in (
        ("ggf", None, r"--to: there is no 'ggf'.*gguf"),
        ("gguf", "Q3_K_M", "--dtype: there is no 'Q3_K_M'.*llama-quantize"),
        ("hf", "q8_0", "--dtype: there is no 'q8_0'"),
        ("comfyui", None, "run: .* is a sft run, of a language model, and --to comfyui is for pictures' models"),
        ("vllm", "f16", "--dtype: there is no 'f16'"),
    ):
        with pytest.raises(UserError, match=why):
            export_run(run, to, tmp_path / "out", dtype, 0.05)
    monkeypatch.setattr("posttrain.commands.export.targets._compressor.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--dtype: gptq is made by llm-compressor, which is not installed; pip install"):
        export_run(run, "hf", tmp_path / "out", "gptq", 0.05)
    with pytest.raises(UserError, match="is no finished run"):
        export_run(tmp_path, "gguf", tmp_path / "out", None, 0.05)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"--out: .* exists already"):
        export_run(run, "gguf", tmp_path / "taken", None, 0.05)
    monkeypatch.setattr("posttrain.models.gguf.families.FAMILIES", {})
    with pytest.raises(UserError, match="no GGUF is written of llama models"):
        export_run(run, "gguf", tmp_path / "out", None, 0.05)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
