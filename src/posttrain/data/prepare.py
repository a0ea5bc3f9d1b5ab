"""From a data config to tokenised train and held-out examples, with an account of every row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.config.schema import DataConfig
from posttrain.data import examples as store
from posttrain.data.builtin import builtin_rows
from posttrain.data.conversations import Encoder
from posttrain.data.examples import Examples
from posttrain.data.shapes import check_fits, recognise, to_canonical
from posttrain.data.sources import fingerprint, read_rows, split_rows
from posttrain.errors import UserError

Row = tuple[int, dict[str, Any]]  # number in the source, canonical row


@dataclass
class Account:
    """What became of a source's rows; goes into the manifest."""

    source: str
    shape: str
    fingerprint: str
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0  # rows cut to max_length (documents are split instead, and lose nothing)
    untrained: int = 0  # rows left out because no token of theirs would count
    border_tokens: int = 0  # tokens across the border of prompt and answer; they do not count


@dataclass(frozen=True)
class Prepared:
    train: Examples
    held_out: Examples
    account: Account
    held_out_account: Account
    key: str  # names all of it: rows, split, tokenizer, options, code


def prepare(data: DataConfig, stage: str, encoder: Encoder, max_length: int, cache: Path) -> Prepared:
    """Read, check, split and tokenise `data` for `stage`, or read it back from the cache.

    Raises UserError for anything wrong with the data, naming file and row.
    """
    marks = [fingerprint(data.path, data.subset, data.split, data.revision)]
    marks += [fingerprint(data.eval_path, data.subset, data.split, data.revision)] if data.eval_path else []
    key = _key(marks, data.model_dump(exclude={"path", "eval_path"}), stage, encoder, max_length)
    path = cache / "data" / f"{key}.safetensors"
    if not path.exists():
        train, held_out, shape = read_split(data, stage)
        parts, report = {}, {}
        for name, rows in (("train", train), ("held_out", held_out)):
            account = Account(data.path if name == "train" else data.eval_path or data.path, shape, marks[0])
            parts[name] = encode(rows, stage, encoder, max_length, account)
            report[name] = asdict(account)
        _refuse_untrained(Account(**report["train"]), data.max_untrained_share)
        store.save(path, parts, report)
    parts, report = store.load(path)
    accounts = {name: Account(**fields) for name, fields in report.items()}  # type: ignore[arg-type]
    return Prepared(parts["train"], parts["held_out"], accounts["train"], accounts["held_out"], key)


def prepare_set(path: str, rows: int, encoder: Encoder, max_length: int) -> tuple[Examples, str]:
    """An evaluation set by its path alone: tokenised, with its kind (text, conversation or pairs)."""
    found = builtin_rows(path.removeprefix("builtin:"), "eval") if path.startswith("builtin:") else None
    raw = enumerate(found, 1) if found is not None else read_rows(path)
    chosen = list(islice(raw, rows))
    kind = recognise(chosen[0][1])
    stage = {"text": "cpt", "pairs": "dpo"}.get(kind, "sft")
    canonical = [(n, to_canonical(row, kind, where=f"{path}, row {n}")) for n, row in chosen]
    account = Account(path, kind, "")
    return encode(canonical, stage, encoder, max_length, account), {"cpt": "text", "dpo": "pairs"}.get(stage, "conversation")


def read_split(data: DataConfig, stage: str) -> tuple[list[Row], list[Row], str]:
    """Canonical rows to train on, those held out, and their shape. Raises UserError for rows that `stage` does not take."""
    if data.path.startswith("builtin:"):
        name = data.path.removeprefix("builtin:")
        train: Iterable[Row] = enumerate(builtin_rows(name, "train"), 1)
        held_out: Iterable[Row] = enumerate(builtin_rows(name, "eval"), 1)
    else:
        rows = read_rows(data.path, subset=data.subset, split=data.split, revision=data.revision)
        if data.eval_path:
            train, held_out = rows, read_rows(data.eval_path, subset=data.subset, split=data.split, revision=data.revision)
        else:
            train, held_out = split_rows(rows, data.eval_share)
    last = data.max_rows and data.skip_rows + data.max_rows
    train_rows, held_out_rows = list(islice(train, data.skip_rows, last)), list(islice(held_out, data.eval_rows))
    if not train_rows:
        raise UserError(f"data.path: {data.path} leaves no row to train on; lower data.eval_share (now {data.eval_share})")
    shape = recognise(train_rows[0][1]) if data.shape == "auto" else data.shape
    check_fits(shape, stage)
    return list(_canonical(train_rows, shape, data.path)), list(_canonical(held_out_rows, shape, data.path)), shape


def _canonical(rows: Iterable[Row], shape: str, path: str) -> Iterator[Row]:
    return ((n, to_canonical(row, shape, where=f"{path}, row {n}")) for n, row in rows)


def encode(rows: list[Row], stage: str, encoder: Encoder, max_length: int, account: Account) -> Examples:
    """Canonical rows -> examples of one stage; fills in `account`."""
    account.rows = len(rows)
    build = {"cpt": _documents, "dpo": _pairs, "rm": _scored_pairs, "ppo": _prompts}.get(stage, _conversations)
    found = build(encoder, rows, max_length, account)
    account.tokens = found.num_tokens
    account.trained_tokens = int((found.weights != 0).sum())
    return found


def _documents(encoder: Encoder, rows: list[Row], max_length: int, account: Account) -> Examples:
    pieces = []
    for (number, _), item in zip(rows, encoder.encode_many(rows, account.source), strict=True):
        for start in range(0, len(item.tokens), max_length):
            stop = start + max_length
            if len(item.tokens[start:stop]) > 1:  # a lone token predicts nothing and is predicted by nothing
                pieces.append((item.tokens[start:stop], item.weights[start:stop], number))
    return store.group(store.build(pieces), max_length)


def _conversations(encoder: Encoder, rows: list[Row], max_length: int, account: Account) -> Examples:
    kept = []
    for (number, _), item in zip(rows, encoder.encode_many(rows, account.source), strict=True):
        account.truncated += len(item.tokens) > max_length
        account.border_tokens += item.borders
        tokens, weights = item.tokens[:max_length], item.weights[:max_length]
        if any(weights[1:]):
            kept.append((tokens, weights, number))
        else:
            account.untrained += 1
    return store.build(kept)


def _scored_pairs(encoder: Encoder, rows: list[Row], max_length: int, account: Account) -> Examples:
    """As `_pairs`, but an answer ends with its end of turn, where it is scored: what a template puts after it is left out."""
    return _pairs(encoder, rows, max_length, account, to_the_end=True)


def _prompts(encoder: Encoder, rows: list[Row], max_length: int, account: Account) -> Examples:
    """Prompts, up to where the assistant begins to write, and the answers known to them; prompts of more than max_length tokens
    are left out."""
    kept, splits = [], []
    for number, row in rows:
        tokens = encoder.encode_prompt(row, where=f"{account.source}, row {number}")
        if len(tokens) <= max_length:
            known = encoder.encode_reference(row)
            kept.append(([*tokens, *known], [0.0] * (len(tokens) + len(known)), number))
            splits.append((len(tokens), len(tokens) + len(known)))
        else:
            account.untrained += 1
    return store.build(kept, splits)


def _pairs(encoder: Encoder, rows: list[Row], max_length: int, account: Account, to_the_end: bool = False) -> Examples:
    kept, splits, margins = [], [], []
    for number, row in rows:
        pair = encoder.encode_pair(row, where=f"{account.source}, row {number}")
        room = max_length - len(pair.prompt)
        answers = (pair.chosen, pair.rejected)
        account.truncated += any(len(a.tokens) > room for a in answers)
        account.border_tokens += sum(a.borders for a in answers)
        lengths = [min(max(room, 0), a.last_trained + 1 if to_the_end else len(a.tokens)) for a in answers]
        cut = [(a.tokens[:length], a.weights[:length]) for a, length in zip(answers, lengths, strict=True)]
        if not pair.prompt or not all(any(weights) for _, weights in cut):
            account.untrained += 1
            continue
        (chosen, w_chosen), (rejected, w_rejected) = cut
        tokens = [*pair.prompt, *chosen, *rejected]
        kept.append((tokens, [0.0] * len(pair.prompt) + [*w_chosen, *w_rejected], number))
        splits.append((len(pair.prompt), len(pair.prompt) + len(chosen)))
        margins.append(float(row.get("margin", 0.0)))
    return store.build(kept, splits, margins)


def _refuse_untrained(account: Account, allowed: float) -> None:
    if account.untrained == account.rows or account.untrained > allowed * account.rows:
        raise UserError(
            f"data.path: {account.untrained} of {account.rows} rows of {account.source} have no token to train on "
            f"(prompts longer than train.max_length, or empty answers); raise train.max_length or data.max_untrained_share"
        )


def _key(marks: list[str], options: dict[str, Any], stage: str, encoder: Encoder, max_length: int) -> str:
    """Content, options, tokenizer, and this package's own code: whatever could change a token or a weight."""
    code = [p.read_text() for p in sorted(Path(__file__).parent.glob("*.py"))]
    parts = [marks, options, stage, encoder.identity, max_length, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
