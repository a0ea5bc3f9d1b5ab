"""Every causal class of transformers, made tiny and put through every stage and method: what trains exactly, and what is refused.

    python scripts/models_matrix.py                            # all of them, into docs/models.md
    python scripts/models_matrix.py --only llama mamba2        # some, as lines
    python scripts/models_matrix.py --json FILE                # the records too; those that are in it are not made again
    python scripts/models_matrix.py --from FILE                # the page alone, from records

The classes come from transformers' own mappings, so what it adds later is seen. Exit code 1 where anything came out wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these architectures alone, without a page")
    parser.add_argument("--out", type=Path, default=PAGE, help="where the page goes")
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--from", type=Path, dest="source", help="records to make the page from")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--limit", type=float, default=240, help="seconds that one architecture may take")
    asked = parser.parse_args()
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    sys.path.insert(0, str(ROOT / "scripts"))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["POSTTRAIN_CACHE"] = cache
        return _run(asked)


def _run(asked: argparse.Namespace) -> int:
    import transformers

    from architectures.page import counts, page
    from architectures.records import read_records
    from architectures.tiny import architectures

    began = time.monotonic()
    chosen = [each for each in architectures() if not asked.only or each.name in asked.only]
    if unknown := set(asked.only) - {each.name for each in chosen}:
        print(f"there is no {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    records = read_records(asked.source) if asked.source else _made(chosen, asked)
    if not asked.only:
        asked.out.write_text(page(records, transformers.__version__))
    found = counts(records)
    print(f"{found}, {time.monotonic() - began:.0f} s")
    return 1 if "wrong" in found or "not causal, trained" in found else 0


def _made(chosen: list, asked: argparse.Namespace) -> list:
    """The records, in order; each is printed, and kept, when it is there."""
    from architectures.records import read_records, write_records
    from architectures.workers import run_all

    found = {record.name: record for record in read_records(asked.json)} if asked.json else {}
    for record in run_all([each for each in chosen if each.name not in found], asked.jobs, asked.limit):
        found[record.name] = record
        if asked.json:
            write_records(asked.json, [found[each.name] for each in chosen if each.name in found])
        cells = " ".join(f"{name}={cell.state}" for name, cell in record.cells.items())
        print(f"{record.name:<24}{record.seconds:6.1f} s  {record.made or record.reading}  {cells}", flush=True)
        said = dict[str, list[str]]()
        for name, cell in record.cells.items():
            said.setdefault(cell.said, []).append(name)
        for line, names in said.items():
            if line:
                print(f"    {' '.join(names)}: {line}", flush=True)
    return [found[each.name] for each in chosen]


if __name__ == "__main__":
    sys.exit(main())
