"""The matrix of architectures: tiny models of any class, what plain transformers says of them, and the matrix of a few."""

from pathlib import Path

import pytest
import torch

from architectures import rows
from architectures.page import counts, exact, page
from architectures.releases import RELEASES
from architectures.shrink import tiny_keywords
from architectures.tiny import Architecture, NotTiny, architectures, quiet
from architectures.tokens import END, make_tokenizer, token_ids
from architectures.trial import CELLS, Cell, Record, Trial
from architectures.workers import run_all

ALL = {each.name: each for each in architectures()}
KINDS = ("llama", "gpt2", "qwen3_moe", "deepseek_v3", "mamba2", "qwen3_next", "gemma2", "qwen2_5_vl", "falcon_h1")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def test_every_class_of_transformers_mapping_is_in_it() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    assert {name: each.class_name for name, each in ALL.items() if each.mapping == "causal"} == dict(CAUSAL)
    assert ALL["qwen3_5+vision"].class_name == "Qwen3_5ForConditionalGeneration" and ALL["qwen3_5"].mapping == "causal"


@pytest.mark.parametrize("name", KINDS)
def test_tiny(name: str, tmp_path: Path) -> None:
    model = ALL[name].make(tmp_path)
    config = model.config.get_text_config()
    assert sum(parameter.numel() for parameter in model.parameters()) < 600_000
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (len(token_ids()), 64, 4)
    assert not rows.sees_later(model)


def test_every_kind_of_layer_is_left() -> None:
    from transformers import CONFIG_MAPPING

    found = CONFIG_MAPPING["qwen3_next"](**tiny_keywords(CONFIG_MAPPING["qwen3_next"]))
    assert set(found.layer_types) == {"linear_attention", "full_attention"}
    assert found.num_experts == 4 and found.num_experts_per_tok == 2


def test_what_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotTiny, match="asks for a picture"):
        ALL["blip"].make(tmp_path)


def test_bert_sees_later_tokens(tmp_path: Path) -> None:
    assert rows.sees_later(ALL["bert"].make(tmp_path))


def test_trained_tokens_are_answers_with_their_end() -> None:
    tokenizer = make_tokenizer()
    for row, conversation in zip(rows.learned_rows(), rows.conversations(), strict=True):
        trained = row.ids[0][row.trained]
        assert tokenizer.decode(trained) == conversation["messages"][1]["content"] + END
    assert max(row.ids.shape[1] for row in rows.learned_rows()) > 2 * 16, "rows are longer than the windows"


def test_plain_loss_of_a_model_that_knows_nothing_is_the_log_of_the_vocabulary(tmp_path: Path) -> None:
    model = ALL["llama"].make(tmp_path)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert rows.plain_loss(model) == pytest.approx(torch.log(torch.tensor(float(len(token_ids())))).item(), rel=1e-6)


def record(name: str, causal: bool = True, **states: str) -> Record:
    cells = {cell: Cell(states.get(cell, "ok"), "why" if cell in states else "") for cell in CELLS}
    return Record(name, f"{name}ForCausalLM", "causal", causal=causal, reading="packed", cells=cells)


def test_page_and_counts_by_hand() -> None:
    found = [
        record("good", experts="none"), record("bad", lora="wrong", dpo="refused"), record("shut", dpo="refused"),
        record("both", causal=False), Record("odd", "OddForCausalLM", "causal", made="needs a picture"),
    ]  # fmt: skip
    assert [exact(each) for each in found] == [True, False, False, False, False]
    assert counts(found) == {"exact": 1, "wrong": 1, "refused": 1, "not causal, trained": 1, "not made": 1}
    text = page(found, "5.0")
    assert "1 of 3 causal classes train exactly in every stage and method (33%)." in text
    assert "| `good` | packed | yes | – | yes | yes | yes | yes | yes | yes | yes | yes |" in text
    assert "- refused: why  \n  `bad` dpo; `shut` dpo" in text
    assert "- `odd` (OddForCausalLM): needs a picture" in text and "**trained** in full" in text


def test_every_release_has_a_row() -> None:
    assert set(RELEASES) <= set(ALL)
    assert "| Llama 2" in page([record("llama", rm="refused")], "5.0") and "| rm refused |" in page(
        [record("llama", rm="refused")], ""
    )


def states(architecture: Architecture, folder: Path) -> dict[str, str]:
    found = Trial(architecture, folder).run()
    assert not found.made
    return {name: cell.state for name, cell in found.cells.items() if cell.state not in ("ok", "none")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba2", "qwen3_next", "deepseek_v3", "qwen2_5_vl"])
def test_trains_exactly_in_every_stage(name: str, tmp_path: Path) -> None:
    assert states(ALL[name], tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert"])
def test_is_refused_by_every_stage(name: str, tmp_path: Path) -> None:
    assert set(states(ALL[name], tmp_path).values()) == {"refused"}


@pytest.mark.slow
def test_what_takes_too_long_is_put_down_and_the_next_one_runs() -> None:
    found = list(run_all([ALL["llama"], ALL["blip"]], jobs=1, limit=0.3))
    assert {cell.state for cell in found[0].cells.values()} == {"failed"} and "0 seconds" in found[0].cells["full"].said
    assert found[1].made == "its forward asks for a picture"
