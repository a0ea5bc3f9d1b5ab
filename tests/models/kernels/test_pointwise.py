"""RoPE and SwiGLU's product in one pass: what they compute, to which modules they are given, and what happens where they cannot.

Simulated: Triton's interpreter runs the kernels where Triton is installed; on a card `doctor --gpu` and the cuda tests do.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

from posttrain.models.kernels import choice, pointwise, usable
from posttrain.models.kernels.beside import compared
from posttrain.models.kernels.choice import use_kernels
from posttrain.models.kernels.liger import Choice
from posttrain.models.kernels.pointwise import rotate, silu_product_backward
from posttrain.models.kernels.usable import beside

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IN_THE_INTERPRETER = """
import contextlib, os, torch
os.environ["TRITON_INTERPRET"] = "1"
torch.cuda.device = lambda _: contextlib.nullcontext()
from posttrain.models.kernels.pointwise import rotate
from posttrain.models.kernels.pointwise_triton import product, product_backward, rotated
from torch.nn.functional import silu

def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

torch.manual_seed(0)
gate, up = (torch.randn(3, 700, requires_grad=True) for _ in range(2))
grad, made = torch.randn(3, 700), silu(gate) * up
same(product(gate.detach(), up.detach()), made.detach())
found = product_backward(grad.clone(), gate.detach(), up.detach(), True)
for got, want in zip(found, (*torch.autograd.grad((made * grad).sum(), (gate, up)), made.detach()), strict=True):
    same(got, want)
given = torch.ones(3, 700)
found = product_backward(given, gate.detach(), up.detach(), False)
assert found[2] is None and bool((given == 1).all())
assert product_backward(given, gate.detach(), up.detach(), True)[1] is given
for batch, angles in ((2, 2), (2, 1), (1, 1)):
    x = torch.randn(batch, 11, 7, 48).transpose(1, 2).requires_grad_()  # as a projection gives it
    turn = torch.randn(angles, 11, 48)
    cos, sin = turn.cos(), turn.sin()  # of both halves apart, which no model has
    turned = rotate(x, cos, sin)
    grad = torch.randn_like(turned)
    same(rotated(x.detach(), cos, sin, x.dtype, back=False), turned.detach())
    same(rotated(grad, cos, sin, x.dtype, back=True), torch.autograd.grad((turned * grad).sum(), x)[0])
half, full = torch.bfloat16, torch.float32
for of_x, of_angles, of_out in ((half, full, full), (half, full, half), (full, half, full), (half, half, half)):
    x, c, s = torch.randn(2, 7, 11, 48).to(of_x), cos.to(of_angles), sin.to(of_angles)
    wide, grad = x.float().requires_grad_(), torch.randn(2, 7, 11, 48).to(of_out)
    turned = rotate(wide, c.float(), s.float())
    there, back = rotated(x, c, s, of_out, back=False), rotated(grad, c, s, of_x, back=True)
    assert there.dtype == of_out and back.dtype == of_x
    for got, want in ((there, turned.detach()), (back, torch.autograd.grad((turned * grad.float()).sum(), wide)[0])):
        near = 2.0**-7 if got.dtype == half else 1e-5  # rounded once; the interpreter cuts off, to within the last place
        torch.testing.assert_close(got.float(), want, rtol=near, atol=1e-5)
"""


def on_a_card(monkeypatch: pytest.MonkeyPatch, obstacle: str) -> None:
    """The model is taken for one on CUDA, and the kernels for what torch computes."""
    monkeypatch.setattr(choice, "obstacle", lambda _: obstacle)
    monkeypatch.setattr(choice, "device_of", lambda _: CARD)
    monkeypatch.setattr(choice, "liger", lambda *_: Choice(None))
    monkeypatch.setattr(pointwise, "on_a_card", lambda _: not obstacle)
    monkeypatch.setattr(pointwise, "_triton", lambda: Stand)


class Stand:
    """The kernels, by torch; calls counts them."""

    calls = 0

    @classmethod
    def rotated(cls, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> Tensor:
        cls.calls += 1
        x, cos, sin = x.float(), cos.float(), sin.float()
        if not back:
            return rotate(x, cos, sin).to(dtype)
        (first, second), (sin_1, sin_2) = x.chunk(2, -1), sin.unsqueeze(1).chunk(2, -1)
        return (x * cos.unsqueeze(1) + torch.cat((second * sin_2, -first * sin_1), -1)).to(dtype)

    @staticmethod
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up

    @staticmethod
    def product_backward(grad: Tensor, gate: Tensor, up: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        active = silu(gate)
        return torch.ops.aten.silu_backward(grad * up, gate), grad * active, active * up if again else None


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=61))


def logits_and_gradients(found: Any) -> list[Tensor]:
    out = found(input_ids=torch.arange(20)[None]).logits
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in found.parameters())]


def test_a_models_attention_finds_ours_and_other_models_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, own = model(), modeling_llama.apply_rotary_pos_emb
    want = logits_and_gradients(plain)
    on_a_card(monkeypatch, "")
    lent = model()
    report = use_kernels(lent, "auto")
    assert report.taken["RoPE"] == 2 and not report.lines
    Stand.calls = 0
    for got, wanted in zip(logits_and_gradients(lent), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert Stand.calls == 8  # of two layers queries and keys, there and back
    assert modeling_llama.apply_rotary_pos_emb is own
    logits_and_gradients(plain)
    assert Stand.calls == 8


def test_full_training_under_autocast_turns_in_one_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are in bfloat16, angles and what is turned in float32, where nothing is rounded: as the family's own."""
    plain = model()
    with torch.autocast("cpu", torch.bfloat16):
        want = logits_and_gradients(plain)
    on_a_card(monkeypatch, "")
    lent = model()
    use_kernels(lent, "auto")
    Stand.calls = 0
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_and_gradients(lent)
    assert Stand.calls == 8
    torch.testing.assert_close(found[0], want[0], rtol=0, atol=0)  # bit for bit; a gradient is rounded once, not thrice
    for got, wanted in zip(found[1:], want[1:], strict=True):
        assert got.dtype == torch.float32 and float((got - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_angles", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [modeling_llama, modeling_olmo2], ids=["llama", "olmo2"])
def test_results_have_the_familys_own_format(
    family: Any, of_x: torch.dtype, of_angles: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's is the wider of both, OLMo's always that of the queries; each is rounded once, there and back."""
    monkeypatch.setattr(pointwise, "on_a_card", lambda _: True)
    monkeypatch.setattr(pointwise, "_triton", lambda: Stand)
    own = family.apply_rotary_pos_emb
    q, k, angles = torch.randn(1, 2, 5, 8).to(of_x), torch.randn(1, 1, 5, 8).to(of_x), torch.randn(1, 5, 8).to(of_angles)
    q.requires_grad_()
    Stand.calls = 0
    found, wanted = (each(q, k, angles.cos(), angles.sin()) for each in (pointwise.rotary(own), own))
    assert Stand.calls == 2 and [x.dtype for x in found] == [x.dtype for x in wanted]
    torch.testing.assert_close(found, wanted, rtol=0 if of_x != of_angles else 1e-2, atol=0 if of_x != of_angles else 1e-2)
    grads = [torch.autograd.grad(x.float().square().sum(), q)[0] for x, _ in (found, wanted)]
    assert grads[0].dtype == of_x
    torch.testing.assert_close(*grads, rtol=5e-2, atol=5e-2)


def test_what_a_family_gives_its_rotation_beside_is_its_own_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some take nothing more, some other names: neither is called with what it does not know."""
    monkeypatch.setattr(pointwise, "on_a_card", lambda _: False)
    x, angles = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8)
    four = pointwise.rotary(lambda q, k, cos, sin: (q, k))
    assert four(x, x, angles, angles) == (x, x)
    monkeypatch.setattr(pointwise, "on_a_card", lambda _: True)
    named = pointwise.rotary(lambda q, k, cos, sin, unsqueeze_dim=1: (q + unsqueeze_dim, k))
    assert torch.equal(named(x, x, angles, angles, unsqueeze_dim=2)[0], x + 2)


def test_a_rotation_of_another_kind_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere turns neighbours, not halves."""
    on_a_card(monkeypatch, "")
    report = use_kernels(CohereForCausalLM(CohereConfig(**SIZES, vocab_size=61)), "auto")
    assert "RoPE" not in report.taken
    assert {each.why for each in report.left if each.kernel == "RoPE"} == {"it is another function"}


def test_where_they_cannot_run_torch_computes_it_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_card(monkeypatch, "Triton and a C compiler (gcc, or CC=...) are not here")
    report = use_kernels(model(), "auto")
    assert "RoPE" not in report.taken and report.taken["SwiGLU"] == 2
    why = "(Triton and a C compiler (gcc, or CC=...) are not here)"
    assert f"RoPE of 2 LlamaAttention {why}" in report.warning and f"SwiGLU by Triton of 2 LlamaMLP {why}" in report.warning


def test_on_a_cpu_nobody_hears_of_them() -> None:
    report = use_kernels(model(), "auto")
    assert "RoPE" not in report.taken and not report.lines and not pointwise.by_triton(torch.ones(2))


def test_the_products_gradients_by_hand() -> None:
    """At gate 0 silu is 0 and its slope a half."""
    of_gate, of_up, product = silu_product_backward(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([3.0]), again=True)
    assert (of_gate.item(), of_up.item()) == (3.0, 0.0) and product is not None and product.item() == 0.0
    assert silu_product_backward(torch.ones(1), torch.ones(1), torch.ones(1), again=False)[2] is None


def test_only_a_gradient_of_ones_own_is_written_over() -> None:
    """up's gradient lies where the one that was given lay, in a layer that has made it itself."""
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    theirs, own = torch.ones(4, 6), torch.ones(4, 6)
    others = silu_product_backward(theirs, gate, up, again=False)
    found = silu_product_backward(own, gate, up, again=True)
    assert torch.equal(theirs, torch.ones(4, 6)) and found[1] is own
    assert torch.equal(found[0], others[0]) and torch.equal(found[1], others[1])


def test_a_try_hands_out_copies() -> None:
    """A backward that writes over its inputs (liger-kernel's SwiGLU did) is compared on the same numbers all the same."""

    class Over(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return x.mul_(2 * grads[0])

    assert beside(Over.apply, lambda x: x.square(), [(8, 16)], CPU) == ""
    given = torch.randn(8, 16)
    assert compared(Over.apply, lambda x: x.square(), [given]) == 0
    assert beside(lambda x: 1.1 * x.square(), lambda x: x.square(), [(8, 16)], CPU).startswith("computes something else here")


def test_a_gradient_that_is_no_number_is_seen() -> None:
    """Also after values that are right: of a number and nan Python's max is the first."""

    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * float("nan")

    assert beside(Lost.apply, lambda x: x.clone(), [(8, 16)], CPU) == "computes something else here (relative error inf)"


def test_what_keeps_them_from_running_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "card_of", lambda _: usable.Card((9, 0), True))
    monkeypatch.setattr(pointwise, "_triton", lambda: Stand)
    own = pointwise.obstacle.__wrapped__
    assert own(CPU) == ""
    monkeypatch.setattr(Stand, "product", staticmethod(lambda gate, up: gate * up))
    assert own(CPU).startswith("Triton's SwiGLU computes something else here (relative error ")
    monkeypatch.setattr(Stand, "rotated", staticmethod(lambda *_, **__: 1 / 0))
    assert own(CPU) == "Triton's RoPE does not run here (ZeroDivisionError: division by zero)"
    monkeypatch.setattr(pointwise, "card_of", lambda _: usable.Card((9, 0), False))
    assert own(CPU) == "Triton and a C compiler (gcc, or CC=...) are not here"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, whose interpreter runs the kernels on a CPU")
def test_the_kernels_in_tritons_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
