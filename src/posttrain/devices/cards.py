"""The cards that `plan --device` knows: a row each, as the vendor's data sheet has it. Imports no torch.

The rates were written down from memory of those sheets, and not held against them. An H100 and an H200 were seen.

Rates are of dense products, without sparsity, with sums in float32; of the SXM form where a card has several. docs/gpu.md has
what an H100 reached of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Card(NamedTuple):
    """One kind of GPU.

    part: of the name that torch reports. memory: GiB. shares_ecc: error correction takes a sixteenth of the memory (GDDR on
    server cards). half, single: TFLOP/s of products in 16 bit, and in float32 without TF32; tf32: with it, 0.0 where there is
    none. bandwidth: GB/s of its memory. capability: NVIDIA's compute capability, or of AMD the number of its gfx name.
    """

    name: str
    part: str
    memory: float
    shares_ecc: bool
    half: float
    tf32: float
    single: float
    bandwidth: float
    capability: tuple[int, int]
    source: str
    vendor: Literal["nvidia", "amd"] = "nvidia"

    @property
    def title(self) -> str:
        """As people call it."""
        return f"{self.part} {self.memory:g} GB"

    @property
    def bytes(self) -> float:
        """What a driver shows of its memory."""
        return self.memory * 2**30 * (15 / 16 if self.shares_ecc else 1)


CARDS = (
    Card("b200", "B200", 180, False, 2250, 1125, 75, 8000, (10, 0), "NVIDIA DGX B200 data sheet, an eighth of it"),
    Card("h200", "H200", 141, False, 989, 494, 67, 4800, (9, 0), "NVIDIA H200 data sheet"),
    Card("gh200", "GH200", 96, False, 990, 495, 67, 4000, (9, 0), "NVIDIA GH200 data sheet, 96 GB"),
    Card("h100", "H100", 80, False, 989, 494, 67, 3350, (9, 0), "NVIDIA H100 data sheet, SXM"),
    Card("h100-pcie", "H100 PCIe", 80, False, 756, 378, 51, 2000, (9, 0), "NVIDIA H100 data sheet, PCIe"),
    Card("h20", "H20", 96, False, 148, 74, 44, 4000, (9, 0), "NVIDIA H20 data sheet"),
    Card("a100", "A100", 80, False, 312, 156, 19.5, 2039, (8, 0), "NVIDIA A100 data sheet, SXM 80 GB"),
    Card("a100-40", "A100", 40, False, 312, 156, 19.5, 1555, (8, 0), "NVIDIA A100 data sheet, 40 GB"),
    Card("l40s", "L40S", 48, True, 362, 183, 91.6, 864, (8, 9), "NVIDIA L40S data sheet"),
    Card("l40", "L40", 48, True, 181, 90, 90.5, 864, (8, 9), "NVIDIA L40 data sheet"),
    Card("pro-6000", "RTX PRO 6000", 96, False, 504, 252, 126, 1792, (12, 0), "NVIDIA Blackwell RTX PRO architecture paper"),
    Card("6000-ada", "RTX 6000 Ada", 48, False, 364, 182, 91.1, 960, (8, 9), "NVIDIA Ada architecture paper"),
    Card("a40", "A40", 48, True, 150, 75, 37.4, 696, (8, 6), "NVIDIA A40 data sheet"),
    Card("a6000", "RTX A6000", 48, False, 155, 77, 38.7, 768, (8, 6), "NVIDIA RTX A6000 data sheet"),
    Card("l4", "L4", 24, True, 121, 60, 30.3, 300, (8, 9), "NVIDIA L4 data sheet"),
    Card("a10", "A10", 24, True, 125, 62, 31.2, 600, (8, 6), "NVIDIA A10 data sheet"),
    Card("a10g", "A10G", 24, True, 70, 35, 35, 600, (8, 6), "NVIDIA A10G data sheet"),
    Card("5090", "RTX 5090", 32, False, 209, 105, 105, 1792, (12, 0), "NVIDIA Blackwell RTX architecture paper"),
    Card("5080", "RTX 5080", 16, False, 113, 56, 56.3, 960, (12, 0), "NVIDIA Blackwell RTX architecture paper"),
    Card("4090", "RTX 4090", 24, False, 165, 83, 82.6, 1008, (8, 9), "NVIDIA Ada architecture paper"),
    Card("4080", "RTX 4080", 16, False, 97.5, 49, 48.7, 717, (8, 9), "NVIDIA Ada architecture paper"),
    Card("3090", "RTX 3090", 24, False, 71, 36, 35.6, 936, (8, 6), "NVIDIA GA102 architecture paper"),
    Card("t4", "T4", 16, True, 65, 0.0, 8.1, 320, (7, 5), "NVIDIA T4 data sheet"),
    Card("v100", "V100", 32, False, 125, 0.0, 15.7, 900, (7, 0), "NVIDIA V100 data sheet, SXM2 32 GB"),
    Card("mi300x", "MI300X", 192, False, 1307, 654, 163, 5300, (9, 4), "AMD Instinct MI300X data sheet", "amd"),
)
NAMES = {card.name: card for card in CARDS}


def card_of(reported: str, memory: float) -> Card | None:
    """The card that torch calls so and that shows so many bytes; None for one that no row is of."""
    words = reported.replace("-", " ").split()
    named = [card for card in CARDS if set(card.part.split()) <= set(words)]
    longest = max((len(card.part) for card in named), default=0)
    alike = [card for card in named if len(card.part) == longest]
    found = min(alike, key=lambda card: abs(card.bytes - memory), default=None)
    return found if found and abs(found.bytes - memory) < 0.15 * memory else None  # a laptop's is another card of the same name
