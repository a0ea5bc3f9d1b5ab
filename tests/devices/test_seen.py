"""Cards that differ, and cards that others have taken; drivers and torch.cuda are stand-ins. No card has been seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.devices.device import Device
from posttrain.devices.seen import Seen, remarks, seen
from posttrain.errors import UserError

GIB = 2**30
A100, H100 = (Device("cuda", name, 80.0 * GIB, capability) for name, capability in (("A100", (8, 0)), ("H100", (9, 0))))


def a_machine(monkeypatch: pytest.MonkeyPatch, folder: Path, free: float, said: str) -> None:
    """A card with so many GiB free, and a driver's tool that says this."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (free * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=f"aaaa-{index}"))
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{said}\nEOF\n".replace("EOF", "END"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_busy_card_is_said_with_the_process_that_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "GPU-aaaa-0, 111, /usr/bin/python3, 18022\nGPU-aaaa-1, 222, other, 900\nGPU-aaaa-0, 333, vllm, [N/A]\nNo such line"
    a_machine(monkeypatch, tmp_path, 60.0, said)
    assert remarks([seen(A100, 0)]) == [
        "gpu 0 (A100) is busy: 20.0 of 80.0 GiB are taken (pid 111 python3 17.6 GiB, pid 333 vllm of unknown size), "
        "60.0 are left for this run"
    ]


def test_a_card_that_is_free_is_not_asked_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_machine(monkeypatch, tmp_path, 79.0, "GPU-aaaa-0, 111, python3, 900")
    assert seen(A100, 0) == Seen("gpu 0", "A100", 80.0 * GIB, 79.0 * GIB, True) and remarks([seen(A100, 0)]) == []


def test_who_has_it_may_be_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_machine(monkeypatch, tmp_path, 8.0, "")
    assert "72.0 of 80.0 GiB are taken (nvidia-smi does not say by whom), 8.0 are left" in remarks([seen(A100, 0)])[0]


def test_cards_that_differ_are_said_and_without_one_format_refused() -> None:
    cards = [Seen(f"gpu {i}", name, size * GIB, size * GIB, True) for i, (name, size) in enumerate([("A100", 40), ("L4", 22)])]
    assert remarks(cards) == [
        "the cards differ (gpu 0 A100, gpu 1 L4): all wait for the slowest, and the smallest memory counts (L4, 22.0 GiB); "
        "CUDA_VISIBLE_DEVICES chooses alike ones"
    ]
    old = Seen("gpu 1", "T4", 15.0 * GIB, 15.0 * GIB, False)
    with pytest.raises(UserError, match=r"train.processes: the cards differ \(gpu 0 A100, gpu 1 T4\).*CUDA_VISIBLE_DEVICES"):
        remarks([cards[0], old])
    with pytest.raises(UserError, match="1 of 2 have a card"):
        remarks([cards[0], None])
    assert remarks([cards[0], cards[0]]) == remarks([None, None]) == []


def test_a_cpu_has_none() -> None:
    assert seen(Device("cpu", "a CPU", 1e9), 0) is None
