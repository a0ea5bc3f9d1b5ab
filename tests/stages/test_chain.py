"""CPT -> SFT -> DPO on the tiny model: what each stage starts from, what it leaves, and what others can load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import posttrain
from posttrain.errors import UserError
from posttrain.runs.files import sha256

TINY = (
    "model=tiny",
    "train.max_steps=3",
    "train.batch_size=2",
    "optim.lr=0.01",
    "data.max_rows=40",
    "data.eval_rows=4",
    "eval.rows=4",
)
METHODS = {"full": (), "lora": ("+peft=lora", "peft.r=4"), "qlora": ("+peft=qlora", "peft.r=4")}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(
    scope="module", params=["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "lora")]
)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    options = (*TINY, *METHODS[request.param])
    posttrain.run("cpt", *options, f"run.dir={folder}/cpt")
    posttrain.run("sft", *options, f"init={folder}/cpt", f"run.dir={folder}/sft")
    posttrain.run("dpo", *options, f"init={folder}/sft", f"run.dir={folder}/dpo")
    return folder


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def test_the_reference_is_what_the_stage_starts_from(chain: Path) -> None:
    """At step 0 policy and reference are one function, so every margin is exactly zero; the base would not give that."""
    before, first = lines(chain / "dpo")[:2]
    assert before["eval/margin"] == 0.0 and before["eval/accuracy"] == 0.5
    assert first["step"] == 1 and first["train/margin"] == 0.0
    assert lines(chain / "dpo")[-2]["train/margin"] != 0.0


def test_each_stage_starts_where_the_one_before_ended(chain: Path) -> None:
    """General loss after a stage is the general loss before the next: nothing is lost between them."""
    for earlier, later in (("cpt", "sft"), ("sft", "dpo")):
        ended, began = lines(chain / earlier)[-1]["general/loss"], lines(chain / later)[0]["general/loss"]
        assert began == pytest.approx(ended, abs=1e-6)
        assert lines(chain / earlier)[0]["general/loss"] != pytest.approx(ended, abs=1e-6)


def test_manifests_name_parents_by_digest(chain: Path) -> None:
    assert manifest(chain / "cpt")["parents"] == []
    for parent, child in (("cpt", "sft"), ("sft", "dpo")):
        record = {"role": "init", "path": str(chain / parent), "digest": sha256(chain / parent / "manifest.json")}
        assert manifest(chain / child)["parents"] == [record]
    found = manifest(chain / "dpo")
    assert found["metrics"]["forgetting/percent"] == pytest.approx(
        100 * (found["metrics"]["general/loss"] / found["metrics"]["general/loss_before"] - 1)
    )
    for name, digest in found["files"].items():
        assert sha256(chain / "dpo" / name) == digest
    assert found["steps"] == 3 and found["tokens"] == lines(chain / "dpo")[-2]["tokens"]


def test_plain_libraries_load_the_result(chain: Path) -> None:
    """The same held-out log-probs through transformers and peft alone, as the run measured with its own path."""
    run = chain / "sft"
    record = manifest(run)
    weights = run / record["weights"]["path"]
    if record["weights"]["kind"] == "model":
        model: Any = AutoModelForCausalLM.from_pretrained(weights)
    else:
        quantized = record["quant"]["method"] == "nf4"
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )  # fmt: skip
        named = json.loads((weights / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32, quantization_config=config if quantized else None)
        model = PeftModel.from_pretrained(base, str(weights))
        for module in model.modules():  # bitsandbytes would round its constants at the first evaluation on a CPU
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(weights)
    from posttrain.data.sources.builtin.sets import builtin_rows

    rows = builtin_rows("general", "eval")[:4]
    total = count = 0.0
    model.eval()
    for row in rows:
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id][:512]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum())
        count += len(ids) - 1
    tolerance = 1e-3 if record["quant"]["method"] == "nf4" else 1e-5
    assert total / count == pytest.approx(record["metrics"]["general/loss"], abs=tolerance)


def test_a_finished_run_is_left_alone_and_another_config_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = chain.name.rstrip("0123456789")
    options = (*TINY, *METHODS[method], f"run.dir={chain}/cpt")
    before = sha256(chain / "cpt" / "manifest.json")
    assert posttrain.run("cpt", *options)["stage"] == "cpt"
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"belongs to another config: optim.lr was 0.01, is now 0.02"):
        posttrain.run("cpt", *options, "optim.lr=0.02")
    assert sha256(chain / "cpt" / "manifest.json") == before


def test_damaged_or_unfinished_init_is_refused(chain: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(chain / "cpt", broken)
    weights = next(p for p in broken.rglob("*.safetensors") if "checkpoints" not in p.parts)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"init: .* is damaged: its sha256"):
        posttrain.run("sft", "model=tiny", f"init={broken}", f"run.dir={tmp_path}/a")
    (broken / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"init: .* is no finished run \(it has checkpoints"):
        posttrain.run("sft", "model=tiny", f"init={broken}", f"run.dir={tmp_path}/b")


def test_lora_then_full_merges_the_adapter_first(tmp_path: Path) -> None:
    posttrain.run("sft", *TINY, *METHODS["lora"], f"run.dir={tmp_path}/lora")
    posttrain.run("dpo", *TINY, f"init={tmp_path}/lora", f"run.dir={tmp_path}/full")
    assert manifest(tmp_path / "full")["weights"] == {"kind": "model", "path": "model"}
    assert lines(tmp_path / "full")[0]["general/loss"] == pytest.approx(lines(tmp_path / "lora")[-1]["general/loss"], abs=1e-5)
    assert lines(tmp_path / "full")[1]["train/margin"] == 0.0
