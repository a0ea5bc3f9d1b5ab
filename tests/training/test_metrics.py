"""Averages by hand: sums over counts, what counts for less, what a checkpoint keeps of them; and an evaluation's."""

import pytest
import torch
from torch import Tensor, nn

from posttrain.batch import LossOutput
from posttrain.data.collate import pack
from posttrain.data.examples import build
from posttrain.training.metrics import Averages, evaluate


def test_sums_over_counts_not_means_of_means() -> None:
    found = Averages()
    found.add({"loss": (torch.tensor(6.0), 3.0), "accuracy": (torch.tensor(1.0), 2.0)})
    found.add({"loss": (torch.tensor(1.0), torch.tensor(1.0))})
    assert found.read() == {"accuracy": 0.5, "loss": 7 / 4}
    assert found.read() == {}, "a reading starts anew"


def test_what_counts_for_nothing_changes_no_average() -> None:
    found = Averages()
    found.add({"loss": (torch.tensor(6.0), 3.0)})
    found.add({"loss": (torch.tensor(100.0), 5.0)}, share=0.0)
    assert found.read() == {"loss": 2.0}
    found.add({"loss": (torch.tensor(6.0), 3.0)})
    found.add({"loss": (torch.tensor(10.0), 2.0)}, share=0.5)
    assert found.read() == {"loss": pytest.approx(11 / 4)}


def test_a_checkpoint_keeps_what_was_not_read_yet() -> None:
    first, second = Averages(), Averages()
    first.add({"loss": (torch.tensor(6.0), 3.0)})
    second.load([first.state()])
    second.add({"loss": (torch.tensor(2.0), 1.0)})
    assert second.read() == {"loss": 2.0}


def test_a_sum_carries_no_gradient() -> None:
    found = Averages()
    found.add({"loss": (torch.tensor(6.0, requires_grad=True), 3.0)})
    assert not found.sums["loss"].requires_grad


class Halves(nn.Module):
    """Gives a half of what it is told, half of it dropped in training."""

    def __init__(self) -> None:
        super().__init__()
        self.share, self.dropout = nn.Parameter(torch.tensor(0.5)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.share * x)


def test_an_evaluation_is_without_dropout_and_without_gradient() -> None:
    """Its loss is the sum over the counts of all batches, and what it says of each unit comes in order."""
    module = Halves().train()
    examples = build([([n] * (n + 2), [1.0] * (n + 2), n) for n in range(3)])  # 1, 2 and 3 predictions
    ticks = list[None]()

    def loss(lm: nn.Module, batch: object) -> LossOutput:
        said = lm(batch.target.float())  # type: ignore[attr-defined]
        assert not said.requires_grad
        return LossOutput(said.sum(), {"loss": (said.sum(), float(len(said)))}, {"said": said})

    batches = [pack(examples, [0, 2]), pack(examples, [1])]
    found, rows = evaluate(module, batches, loss, torch.device("cpu"), lambda: ticks.append(None))
    assert found == {"loss": pytest.approx((3 * 1.0 + 2 * 0.5) / 6)}  # tokens 0, 2 2 2 and 1 1
    assert rows["said"].tolist() == [0.0, 1.0, 1.0, 1.0, 0.5, 0.5] and len(ticks) == 2
