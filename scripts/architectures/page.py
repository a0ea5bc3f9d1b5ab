"""docs/models.md: what became of every architecture, in one table, and why where it was refused."""

from __future__ import annotations

from collections import Counter

from architectures.releases import RELEASES
from architectures.trial import CELLS, Cell, Record

COLUMNS = ("reading", "lora", "experts", "qlora", "full", "dpo", "rm", "ppo", "merge", "reload", "plan")
SIGNS = {"ok": "yes", "refused": "refused", "failed": "**fails**", "wrong": "**wrong**", "none": "–"}
READINGS = {"packed": "packed", "joined": "end to end", "rows": "one a row", "alone": "one a forward", "": "refused"}
INTRODUCTION = """# Models

<!-- made by `make models`; do not edit by hand -->

Every class of transformers {transformers} that it lists as a causal language model, and the text of every image-text-to-text
class, made tiny with random weights and put through every stage: `scripts/models_matrix.py`. Each result is compared with plain
transformers and plain peft, in float32, one row a forward, with no packing:

- **reading**: `packed` – documents share packs; `end to end` – so do they, each with a prompt of its own; `one a row` – in a pack
  they would see one another, so each has a row of its own; `one a forward` – padding would change them too.
- **full**: two steps of `sft peft=none`; losses and gradient norms are those of a plain loop with AdamW (1e-4).
- **lora**, **qlora**: `sft +peft=lora` and `+peft=qlora` begin at the base's loss and learn. **experts**: both train the
  routed experts; – where there are none.
- **dpo**, **rm**, **ppo**: on top of the LoRA run; first loss log 2, margin 0, log-probs and scores as in plain peft; what the
  policy samples has the same log-probs in generation and in training.
- **merge**, **reload**: plain transformers on merged and on full weights, and plain peft on the adapter, give the run's own
  held-out loss (1e-4); no weight is missing or left over. **plan**: `posttrain plan` ends as the LoRA run does.
"""


def page(records: list[Record], transformers: str) -> str:
    """The whole page, in Markdown."""
    made = [record for record in records if not record.made]
    causal = [record for record in made if record.causal]
    others = [record for record in made if not record.causal]
    parts = [INTRODUCTION.format(transformers=transformers), _counts(records, causal, others)]
    for mapping, title in (("causal", "Causal language models"), ("vision", "Text on vision-language models")):
        rows = [record for record in causal if record.mapping == mapping]
        if rows:
            parts += [f"## {title}\n", _table(rows), _unpacked(rows), _reasons(rows)]
    if others:
        parts += [
            "## Not causal\n\nA later token changes what is predicted before it, or there is an encoder: refused.\n",
            _lines(others),
        ]
    if unmade := [record for record in records if record.made]:
        parts += ["## Not tried\n\nWhat cannot be made tiny, or not run on text.\n"]
        parts += ["".join(f"- `{record.name}` ({record.class_name}): {record.made}\n" for record in unmade)]
    return "\n".join([*parts, _released(records)])


def exact(record: Record) -> bool:
    """Does every cell that there is hold?"""
    return not record.made and record.causal and all(record.cells[name].state in ("ok", "none") for name in CELLS)


def counts(records: list[Record]) -> dict[str, int]:
    """How many are how, each architecture once."""
    found = Counter[str]()
    for record in records:
        states = {cell.state for name, cell in record.cells.items() if name != "plan" or record.causal}
        if record.made:
            found["not made"] += 1
        elif not record.causal:
            found["not causal, refused" if states <= {"refused", "none"} else "not causal, trained"] += 1
        else:
            order = ("wrong", "failed", "refused")
            found["exact" if exact(record) else next(state for state in order if state in states)] += 1
    return dict(found)


def _counts(records: list[Record], causal: list[Record], others: list[Record]) -> str:
    whole = sum(map(exact, causal))
    lines = [
        f"{whole} of {len(causal)} causal classes train exactly in every stage and method ({whole / max(1, len(causal)):.0%})."
    ]
    lines += ["", "| cell | yes | refused | fails | wrong | – |", "|---|---|---|---|---|---|"]
    for name in COLUMNS[1:]:
        states = Counter(record.cells[name].state for record in causal)
        lines.append(
            f"| {name} | " + " | ".join(str(states[state]) for state in ("ok", "refused", "failed", "wrong", "none")) + " |"
        )
    return "\n".join(lines) + "\n"


def _table(rows: list[Record]) -> str:
    lines = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for record in rows:
        cells = [READINGS.get(record.reading, record.reading), *(SIGNS[record.cells[name].state] for name in COLUMNS[1:])]
        lines.append(f"| `{record.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _unpacked(rows: list[Record]) -> str:
    """Why documents do not share packs, each reason once."""
    found: dict[str, list[str]] = {}
    for record in rows:
        if record.reading in ("rows", "alone"):
            found.setdefault(_plain(record.why), []).append(f"`{record.name}`")
    lines = [f"- {why}  \n  {', '.join(names)}" for why, names in found.items()]
    return "\n".join(["### One document a row or a forward\n", *lines]) + "\n" if lines else ""


def _reasons(rows: list[Record]) -> str:
    """Each line once, with what it was said of."""
    found: dict[str, dict[str, list[str]]] = {}
    for record in rows:
        for name, cell in record.cells.items():
            if cell.state in ("refused", "failed", "wrong"):
                found.setdefault(_line(cell), {}).setdefault(record.name, []).append(name)
    if not found:
        return ""
    lines = ["### Reasons\n"]
    for line, where in found.items():
        lines.append(f"- {line}  \n  " + "; ".join(f"`{name}` {', '.join(cells)}" for name, cells in where.items()))
    return "\n".join(lines) + "\n"


def _line(cell: Cell) -> str:
    return _plain(f"{cell.state}: {cell.said}")


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _lines(records: list[Record]) -> str:
    found = []
    for record in records:
        said = dict.fromkeys(_line(cell) for cell in record.cells.values() if cell.state not in ("ok", "none"))
        trained = [name for name, cell in record.cells.items() if cell.state == "ok" and name != "plan"]
        found.append(f"- `{record.name}`: " + "; ".join([*said, *([f"**trained** in {', '.join(trained)}"] if trained else [])]))
    return "\n".join(found) + "\n"


def _released(records: list[Record]) -> str:
    """The rows of well-known models."""
    lines = [
        "## Released models\n",
        "By `model_type` in config.json, which says the row of models that are not listed here too.\n",
    ]
    lines += ["| released as | architecture | reading | not exact |", "|---|---|---|---|"]
    for record in records:
        if record.name in RELEASES:
            short = [f"{name} {SIGNS[cell.state]}" for name, cell in record.cells.items() if cell.state not in ("ok", "none")]
            states = "not made" if record.made else ", ".join(short) or "–"
            reading = READINGS.get(record.reading, record.reading)
            lines.append(f"| {RELEASES[record.name]} | `{record.name}` | {reading} | {states} |")
    return "\n".join(lines) + "\n"
