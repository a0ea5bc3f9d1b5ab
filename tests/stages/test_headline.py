"""The first line of a run."""

import pytest

from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.stages.headline import headline


@pytest.mark.parametrize(
    ("words", "lr", "processes", "line"),
    [
        (
            ["sft", "+peft=qlora", "optim.lr=2e-4"],
            None,
            1,
            "sft: qlora (r=16) over nf4; paged_adamw_8bit at 2e-4, cosine; 1,200 steps; on cpu",
        ),
        (
            ["cpt", "optim.lr=auto"],
            1.5e-5,
            4,
            "cpt: all weights; adamw at 1.5e-5 (found), cosine; 1,200 steps; on cpu, 4 processes",
        ),
    ],
)
def test_it_names_method_rate_steps_and_device(words: list[str], lr: float | None, processes: int, line: str) -> None:
    cfg = typed_config(compose_run(words[0], ["model=tiny", *words[1:]], None))
    assert headline(cfg, 1200, lr, "cpu", processes) == line
