"""Fisher information and its penalty against closed forms."""

import pytest
import torch

from posttrain.losses.ewc import ewc_penalty, fisher_diagonal


def test_fisher_of_two_parameters_is_its_closed_form() -> None:
    """p(y=1 | x) = sigmoid(w x + b). Each sample's gradient is (y - p) (x, 1), so F = mean (y - p)^2 (x^2, 1)."""
    w, b = torch.tensor(0.5, requires_grad=True), torch.tensor(-0.25, requires_grad=True)
    x = torch.tensor([-2.0, -1.0, 0.5, 3.0])
    p = torch.sigmoid(0.5 * x - 0.25)
    # every outcome with its probability: 4 samples a point, weighted by drawing y as often as it is likely
    often = [(float(a), y, round(1000 * float(q if y else 1 - q))) for a, q in zip(x, p, strict=True) for y in (1.0, 0.0)]
    samples = [(a, y) for a, y, times in often for _ in range(times)]

    def log_likelihoods():  # type: ignore[no-untyped-def]
        for a, y in samples:
            z = w * a + b
            yield torch.nn.functional.logsigmoid(z if y else -z)

    f_w, f_b = fisher_diagonal(log_likelihoods(), [w, b])
    # in expectation over the model's own y: mean of p (1 - p) x^2, and of p (1 - p)
    assert float(f_w) == pytest.approx(float((p * (1 - p) * x**2).mean()), rel=2e-3)
    assert float(f_b) == pytest.approx(float((p * (1 - p)).mean()), rel=2e-3)


def test_it_is_a_mean_of_squares_and_no_square_of_a_mean() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    (found,) = fisher_diagonal([(w * torch.tensor(g)).sum() for g in ([1.0, 3.0], [-1.0, 1.0])], [w])
    assert found.tolist() == [1.0, 5.0]  # the mean gradient's square would be [0, 4]


def test_a_parameter_that_a_sample_does_not_touch() -> None:
    w, other = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    assert [float(f) for f in fisher_diagonal([w * 3, other * 4], [w, other])] == [4.5, 8.0]


def test_penalty_by_hand() -> None:
    params = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(0.0, requires_grad=True)]
    start, importance = [torch.tensor([0.0, 2.0]), torch.tensor(3.0)], [torch.tensor([2.0, 7.0]), torch.tensor(0.5)]
    value = ewc_penalty(params, start, importance, 4.0)
    assert float(value.detach()) == 0.5 * 4 * (2 * 1 + 7 * 0 + 0.5 * 9)
    gradients = torch.autograd.grad(value, params)
    assert [g.tolist() for g in gradients] == [[8.0, 0.0], -6.0]  # strength F (theta - theta0)
