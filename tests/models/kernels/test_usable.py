"""Which way of attention is taken on which card: a table of what is known, and a try that overrules it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.models.kernels import usable
from posttrain.models.kernels.attention import ON_CUDA, attention_function, ways_of_attention
from posttrain.models.kernels.masks import Asked
from posttrain.models.kernels.usable import Card, obstacle

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
PLAIN = Asked(4, 2, 64, 64, None, None, False)
H100, T4, NO_GCC = Card((9, 0), True), Card((7, 5), True), Card((8, 9), False)
NO = {
    "softcap": "varlen cannot compute its softcap or sinks",
    "dtype": "varlen computes in 16 bits, and the model in float32",
    "card": "varlen needs a card of compute capability 8.0, and this one has 7.5",
    "sizes": "varlen needs keys and values of one size, and a head's are 192 and 128",
    "size": "varlen has no kernel for heads of size 512",
    "gcc": "flex needs Triton and a C compiler (gcc, or CC=...), which are not here",
}
# the card, what the layers ask for, the model's format: the way that is taken, and what is said of the others
TABLE: list[tuple[Card, list[Asked], torch.dtype, str, list[str]]] = [
    (H100, [PLAIN], BF16, "varlen", []),
    (H100, [PLAIN, PLAIN._replace(window=512)], torch.float16, "varlen", []),
    (H100, [PLAIN._replace(size=256, value_size=256)], BF16, "varlen", []),
    (H100, [PLAIN, PLAIN._replace(softcap=50.0)], BF16, "flex", [NO["softcap"]]),
    (H100, [PLAIN._replace(sinks=True)], BF16, "flex", [NO["softcap"]]),
    (H100, [PLAIN], FP32, "flex", [NO["dtype"]]),
    (H100, [PLAIN._replace(size=192, value_size=128)], BF16, "flex", [NO["sizes"]]),
    (H100, [PLAIN, PLAIN._replace(size=512, value_size=512)], BF16, "flex", [NO["size"]]),
    (T4, [PLAIN], torch.float16, "flex", [NO["card"]]),
    (NO_GCC, [PLAIN], BF16, "varlen", []),
    (NO_GCC, [PLAIN], FP32, "documents", [NO["dtype"], NO["gcc"]]),
]


@pytest.mark.parametrize(("card", "asked", "dtype", "way", "said"), TABLE)
def test_the_way_by_card_shapes_and_format(
    card: Card, asked: list[Asked], dtype: torch.dtype, way: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usable, "card_of", lambda _: card)
    monkeypatch.setattr(usable, "_tried", lambda *_: "")
    ways = ways_of_attention("auto", torch.device("cuda"))
    found = {how: obstacle(how, asked, dtype, CPU, attention_function) if how in ON_CUDA else "" for how in ways}
    assert next(how for how in ways if not found[how]) == way
    assert [found[how] for how in ways[: ways.index(way)]] == said


def with_kernel(function: Any) -> Any:
    """The ways of attention, with this as that of every kernel."""
    return lambda how: attention_function(how) if how == "dense" else function


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory\nRequired: 131072")


def top_left(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, document_mask: Any, **options: Any) -> Any:
    """A kernel whose causal mask begins where the keys do: answers do not see the end of their prompt."""
    segments = [s._replace(prefix_stop=max(s.prefix_start, s.prefix_stop - 1)) for s in document_mask.segments]
    other = usable.DocumentMask(segments, document_mask.num_tokens, document_mask.device)
    return attention_function("dense")(module, query, key, value, None, document_mask=other, **options)


def test_a_kernel_is_tried_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not run, or computes something else, is passed over with a line that says which."""
    monkeypatch.setattr(usable, "card_of", lambda _: H100)
    asked = [PLAIN, PLAIN._replace(window=512)]
    right = with_kernel(attention_function("documents"))
    assert obstacle("varlen", asked, BF16, CPU, right) == obstacle("varlen", asked, torch.float16, CPU, right) == ""
    why = "flex does not run here (No valid triton configs. OutOfResources: out of resource: shared memory)"
    assert obstacle("flex", asked, BF16, CPU, with_kernel(fails)) == why
    assert obstacle("varlen", asked, BF16, CPU, with_kernel(top_left)).startswith(
        "varlen computes something else here (relative error "
    )


def test_a_try_leaves_random_numbers_alone_and_is_made_once() -> None:
    seen: list[Any] = []
    torch.manual_seed(3)
    before = torch.get_rng_state()

    def right(*given: Any, **options: Any) -> Any:
        seen.append(options)
        return attention_function("dense")(*given, **options)

    ways = with_kernel(right)
    assert [usable._tried("flex", (PLAIN, PLAIN._replace(window=512)), FP32, CPU, ways) for _ in range(2)] == ["", ""]
    assert [each["sliding_window"] for each in seen] == [None, usable.NEAR]
    assert torch.equal(torch.get_rng_state(), before)
