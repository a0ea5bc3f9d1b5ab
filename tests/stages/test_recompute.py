"""train.gradient_checkpointing: as many layers as memory asks for, and the same run whatever their number."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import posttrain
from posttrain.errors import UserError
from posttrain.models.activations import layers_to_recompute
from posttrain.stages import recompute

RUN = ("sft", "model=tiny", "+peft=lora", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "eval.sets=null")


def test_layers_by_hand() -> None:
    """Ten layers leave 100 each, of which 10 are inputs; 50 are asked for besides."""
    assert layers_to_recompute(1050, 50, 100, 10, 10) == 0
    assert layers_to_recompute(1049, 50, 100, 10, 10) == 2  # 101 too much with the one that is there in whole: two spare 180
    assert layers_to_recompute(600, 50, 100, 10, 10) == 7  # 550 / 90
    assert layers_to_recompute(0, 50, 100, 10, 10) == 10


def trained(tmp_path: Path, name: str, *words: str) -> dict[str, torch.Tensor]:
    posttrain.run(*RUN, *words, f"run.dir={tmp_path / name}")
    return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")


def test_little_memory_recomputes_layers_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained(tmp_path, "plain")
    assert "recomputed" not in capsys.readouterr().out
    monkeypatch.setattr(recompute, "free_bytes", lambda device: 1e6)
    little = trained(tmp_path, "little")
    said = re.search(r"(\d+) of (\d+) layers are recomputed", capsys.readouterr().out)
    assert said and said[1] == said[2]
    one = trained(tmp_path, "one", "train.gradient_checkpointing=1")
    for other in (little, one):
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_it_is_a_number_of_layers_or_a_word() -> None:
    for word in ("0", "some"):
        with pytest.raises(UserError, match="gradient_checkpointing"):
            posttrain.run(*RUN, f"train.gradient_checkpointing={word}")
