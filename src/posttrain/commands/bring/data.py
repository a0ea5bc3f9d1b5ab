"""The data of another tool's config: sources, their splits, and what they call the columns."""

from __future__ import annotations

from typing import Any, cast

from posttrain.commands.bring.tools import FACTORY
from posttrain.commands.bring.translation import Translation
from posttrain.config.other_tools import words

_SHAPES = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": "auto"}
_HERE = ("path", "split", "name", "data_files", "type", "ds_type", "id", "config", "revision", "roles_to_train", "train_on_eos")
# their word for a column -> ours
_OF_ALL = (("data.split", ("split",)), ("data.subset", ("name", "config")), ("data.revision", ("revision",)))
_ROLES = {"human": "user", "gpt": "assistant"}
_COLUMNS = {
    "field_messages": "messages",
    "field": "text",
    "text_column": "text",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
    "field_prompt": "prompt",
    "field_completion": "completion",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_label": "label",
}
_MESSAGES = "messages are {role, content} or {from, value}; posttrain preview shows what is read"
_SAID = {
    "ds_type": "the reader looks at the file",
    "columns": "columns without a meaning are left alone",
    "weight": "data.max_rows uses a part of the rows; data=mix draws by shares of tokens",
    **dict.fromkeys(("message_property_mappings", "message_field_role", "message_field_content"), _MESSAGES),
    "roles": "roles are user, assistant, system, tool and ShareGPT's human and gpt; posttrain preview shows what is read",
    "chat_template": "model.chat_template is one for all",
    "message_field_training": "a message's own weight, train or loss counts; rename the column",
}


def read_data(found: Translation) -> None:
    """data.path and its companions; where the file names no data that we can find, data: file, which asks for a path."""
    sources = _sources(found)
    places = _together(sources)
    paths = [path for place in places if (path := _path(place))]
    paths = [each for path in paths for each in (cast("list[str]", path) if isinstance(path, list) else [path])]
    if not paths:
        found.put("data", "file", "no data that can be found here: say data.path=...")
        return
    found.put("data.path", paths[0] if len(paths) == 1 else paths, "the data")
    for ours, theirs in _OF_ALL:
        values = {str(value) for place in places for word in theirs if (value := place.get(word))}
        if len(values) == 1:
            found.put(ours, values.pop(), theirs[0])
        elif values:
            found.note(theirs[0], sorted(values), f"{ours} is one for all; a mixture (data=mix) has one each")
    kinds = {str(source["type"]) for source in sources if source.get("type")}
    if shape := _SHAPES.get(next(iter(kinds))) if len(kinds) == 1 else "":
        found.put("data.shape", shape, "type")
    elif kinds:
        found.note("type", sorted(kinds), "data.shape=auto looks at the columns; see posttrain preview")
    _read_roles(found, sources)
    for source in sources:
        for word in source.keys() - set(_HERE):
            _read_word(found, word, source[word])


def _read_roles(found: Translation, sources: list[dict[str, Any]]) -> None:
    """Whose turns are learnt, with their ends, where that is not what is usual there and here."""
    given = [source["roles_to_train"] for source in sources if isinstance(source.get("roles_to_train"), list)]
    roles = [[_ROLES.get(str(role), str(role)) for role in cast("list[Any]", each)] for each in given]
    if roles and all(each == roles[0] for each in roles) and roles[0] != ["assistant"]:
        found.put("data.train_on", roles[0], "roles_to_train")
    elif any(each != ["assistant"] for each in roles):
        found.note("datasets.roles_to_train", given, words()["roles_to_train"].says)
    for end in {str(source.get("train_on_eos") or "turn") for source in sources} - {"turn"}:
        found.note("datasets.train_on_eos", end, words()["train_on_eos"].says)


def _read_word(found: Translation, word: str, value: Any) -> None:
    """Of one source."""
    ours = _COLUMNS.get(word)
    if not ours or not isinstance(value, str):
        found.note(f"datasets.{word}", value, _SAID.get(word, "has no like here; see posttrain preview"))
    elif value != ours:
        found.put(f"data.columns.{ours}", value, word)


def _path(source: dict[str, Any]) -> Any:
    return source.get("data_files") or source.get("path") or source.get("id")


def _together(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where the rows are: several splits of one data set are one place, written as `datasets` does: train+test."""
    splits: dict[str, list[str]] = {}
    places: dict[str, dict[str, Any]] = {}
    for source in sources:
        name = repr((_path(source), source.get("name") or source.get("config")))
        places.setdefault(name, source)
        splits.setdefault(name, []).append(str(source.get("split") or ""))
    usual = {name: "train" if any(some) else "" for name, some in splits.items()}  # of a source that names none
    return [
        place | {"split": "+".join(dict.fromkeys(split or usual[name] for split in splits[name]))}
        for name, place in places.items()
    ]


def _sources(found: Translation) -> list[dict[str, Any]]:
    sources: list[Any] = []
    _read_held_out(found)
    for word in ("datasets", "pretraining_dataset", "train_dataset", "dataset", "dataset_name"):
        value = found.take(word)
        value = [each.strip() for each in value.split(",")] if isinstance(value, str) and found.tool == FACTORY else value
        sources += cast("list[Any]", value) if isinstance(value, list) else [value] if value else []
    if isinstance(mixture := found.take("dataset_mixture"), dict):
        inner = mixture.get("datasets")
        sources += cast("list[Any]", inner) if isinstance(inner, list) else []
        for word in mixture.keys() - {"datasets"}:
            found.note(
                f"dataset_mixture.{word}", mixture[word], "held-out rows are data.eval_share of the rows, or data.eval_path"
            )
    if isinstance(mixer := found.take("dataset_mixer"), dict):
        sources += [{"id": name, "weight": share} for name, share in mixer.items()]
    given = found.tree.get("dataset_splits")
    splits = [str(name) for name in cast("list[Any]", given) if "train" in str(name)] if isinstance(given, list) else []
    if len(splits) == 1:
        found.read.add("dataset_splits")
        found.put("data.split", splits[0], "dataset_splits")
    companions = {"split": found.take("dataset_train_split"), "name": found.take("dataset_config")}
    rows = [{"path": each, **companions} if isinstance(each, str) else _opened(each) for each in sources if _names_data(each)]
    for each in sources:
        if not _names_data(each):
            found.note("dataset", each, "is no path, no hub id, and no source with either")
    names = [row for row in rows if found.tool == FACTORY and not _is_place(str(row.get("path")))]
    for row in names:
        found.note("dataset", row.get("path"), "names of LLaMA-Factory's own dataset_info.json: say data.path=...")
    return [row for row in rows if row not in names]


def _names_data(source: Any) -> bool:
    return isinstance(source, str | dict)


def _opened(source: dict[str, Any]) -> dict[str, Any]:
    """With the columns that Axolotl's own prompt format names as words of the source."""
    inner = cast("Any", source.get("type"))
    if not isinstance(inner, dict):
        return {str(word): value for word, value in source.items()}
    fields = {word: value for word, value in cast("dict[str, Any]", inner).items() if word.startswith("field_")}
    return {word: value for word, value in source.items() if word != "type"} | fields | {"format": inner}


def _read_held_out(found: Translation) -> None:
    """data.eval_path, of a path or of the one source that has one."""
    for word in ("eval_dataset", "test_datasets"):
        given = found.take(word)
        one = cast("list[Any]", given)[0] if isinstance(given, list) and len(cast("list[Any]", given)) == 1 else given
        path = _path(cast("dict[str, Any]", one)) if isinstance(one, dict) else one
        if isinstance(path, str) and (found.tool != FACTORY or (_is_place(path) and "," not in path)):
            found.put("data.eval_path", path, word)
            if isinstance(one, dict) and one.get("split"):
                found.note(f"{word}.split", one["split"], "data.eval_path is read in data.split; a file has none")
        elif given is not None:
            found.note(word, given, "say data.eval_path=PATH, one place of rows")


def _is_place(text: str) -> bool:
    return "/" in text or text.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))
