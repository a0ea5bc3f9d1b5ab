"""Names, meanings and ways of writing of figures."""

import pytest

from posttrain.config.metrics import METRICS, direction, metric, rounded, show, title


@pytest.mark.parametrize(
    ("name", "words", "better"),
    [
        ("eval/loss", "Loss, held out", -1),
        ("general/loss", "Loss, general text", -1),
        ("forgetting/percent", "Forgetting, general text", -1),
        ("drift_class/percent", "Rise of the loss, class", -1),
        ("train/tokens_per_second", "Speed, training", 0),
        ("train/loss_sft", "Loss, sft, training", -1),
        ("train/reward_brevity", "Reward, brevity, training", 1),
        ("train/reward_std", "Spread of rewards, training", 0),
        ("answers/rouge_l", "Rouge l, answers", 1),
        ("answers/length", "Length, answers", 1),
        ("math/accuracy", "Accuracy, math", 1),
        ("train/my_own", "My own, training", 0),
    ],
)
def test_a_figure_has_a_name_and_a_direction(name: str, words: str, better: int) -> None:
    assert (title(name), direction(name)) == (words, better)


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("eval/loss", 1.23456, "1.2346"),
        ("eval/accuracy", 0.5, "50.0%"),
        ("forgetting/percent", 0.0149, "+0.01 %"),
        ("eval/perplexity", 12345.6, "12,346"),
        ("eval/length", 3.0, "3.0"),
        ("train/lr", 0.0002, "2e-4"),
        ("train/tokens_per_second", 5333.3, "5,333"),
        ("eval/loss", None, "—"),
        ("eval/loss", float("nan"), "no number"),
        ("eval/loss", float("inf"), "∞"),
        ("eval/reward", float("-inf"), "−∞"),
    ],
)
def test_values_are_written_for_people(name: str, value: float | None, written: str) -> None:
    assert show(name, value) == written


def test_three_digits_say_enough() -> None:
    numbers = (0, 1.5e-5, 1.25e-10, 0.00123456, 12.345, 999.4, 5333.3, 1234567)
    assert [rounded(value) for value in numbers] == ["0", "1.5e-5", "1.25e-10", "0.00123", "12.3", "999", "5,330", "1,230,000"]


def test_every_figure_says_what_it_means() -> None:
    silent = {name for name, each in METRICS.items() if not each.meaning}
    assert silent == {"value_loss", "rollout_tokens_per_second", "update_tokens_per_second", "count"}, "their names say it"
    assert all(metric(f"train/{name}") == each for name, each in METRICS.items())
