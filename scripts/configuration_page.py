"""docs/configuration.md from what the tool itself reads: explanations from the comments in configs/**/*.yaml, defaults from the
composed configs, choices and bounds from the schema. What stands between the tables is scripts/configuration_page.md.

    python scripts/configuration_page.py            # writes docs/configuration.md

scripts/yaml_comments.py says where a comment belongs. A key that the files of a stage do not explain has the meaning that most
other stages give it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.compose import compose
from posttrain.config.paths import root
from posttrain.stages.spec import stages
from yaml_comments import Explained, header, said

HERE = Path(__file__).resolve().parent
TEMPLATE, PAGE = HERE / "configuration_page.md", HERE.parent / "docs" / "configuration.md"
CONFIGS = root("configs")
STAGES = {name: spec.config_class for name, spec in stages().items() if (CONFIGS / f"{name}.yaml").exists()}
GROUPS = ("model", "data", "peft", "quant", "optim", "hydra/launcher")
VARIANTS = {"peft": "peft=", "quant": "quant="}  # sections whose keys depend on the file that is chosen
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
WORDS = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text", "null": "`null`"}
Schema = dict[str, Any]


@dataclass
class Key:
    """One row of a table: what a key is by default, and what it means, in each stage or method (a variant) that has it."""

    defaults: dict[str, str]
    meanings: dict[str, str]
    choices: str


# reading the schema


def resolved(schema: Schema, whole: Schema) -> Schema:
    """The schema itself where it is only named."""
    return whole["$defs"][schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else schema


def choices(schema: Schema, whole: Schema) -> str:
    """What a value may be, in words: "`a`, `b`", "integer ≥ 1 or `null`"."""
    schema = resolved(schema, whole)
    if "anyOf" in schema:
        parts = [choices(each, whole) for each in schema["anyOf"]]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        items = schema.get("prefixItems")
        return f"{len(items)} of: {choices(items[0], whole)}" if items else f"list of {choices(schema['items'], whole)}"
    if schema.get("type") == "object":
        more = schema.get("additionalProperties")
        of = resolved(more, whole) if isinstance(more, dict) else {}
        return "name: text" if of.get("type") == "string" else "name: keys"
    return f"{WORDS.get(schema.get('type', ''), '')}{limits(schema)}"


def limits(schema: Schema) -> str:
    """The bounds of a number, with a space before them."""
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    found = [text.format(f"{schema[key]:g}") for key, text in BOUNDS.items() if key in schema]
    return "".join(f" {text}" for text in found[:1]) + "".join(f" and {text}" for text in found[1:])


def leaves(schema: Schema, whole: Schema, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Dotted key -> schema, of all keys that are not sections. A part of several variants is left out."""
    for name, part in resolved(schema, whole).get("properties", {}).items():
        inner = resolved(part, whole)
        if "properties" in inner:
            yield from leaves(inner, whole, f"{prefix}{name}.")
        elif "oneOf" not in inner and "discriminator" not in inner:
            yield prefix + name, inner


def at(tree: Any, key: str) -> Any:
    """The value of a dotted key; KeyError where it is absent."""
    for part in key.split("."):
        tree = tree[part]
    return tree


def has(tree: Any, key: str) -> bool:
    try:
        at(tree, key)
    except KeyError:
        return False
    return True


# one row a key


def add(keys: dict[str, Key], variant: str, config: dict[str, Any], found: dict[str, Explained], schema: dict[str, str]) -> None:
    """Enter what one stage or method has into the rows."""
    for name, allowed in schema.items():
        if not has(config, name):
            continue
        here = found.get(name, Explained(None, ""))
        computed = "${" in (here.value or "")
        row = keys.setdefault(name, Key({}, {}, allowed))
        row.defaults[variant] = "computed" if computed else f"`{as_word(at(config, name))}`"
        row.meanings[variant] = here.comment


def as_word(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", f"{value:g}").replace("e+", "e")
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n...\n").strip()


@cache
def stage_keys() -> dict[str, Key]:
    """Every key that does not depend on a method, with the stages that have it."""
    keys: dict[str, Key] = {}
    for stage, kind in STAGES.items():
        whole = kind.model_json_schema()
        allowed = {name: choices(schema, whole) for name, schema in leaves(whole, whole) if name != "stage"}
        config = compose(stage, [])
        add(keys, stage, config, said(CONFIGS / f"{stage}.yaml"), allowed)
    return keys


@cache
def variant_keys(group: str) -> dict[str, Key]:
    """Every key of a group whose files have keys of their own, with the files that have it."""
    keys: dict[str, Key] = {}
    stage = next(iter(STAGES))
    whole = STAGES[stage].model_json_schema()
    kinds = resolved(whole["properties"][group], whole)["discriminator"]["mapping"]
    for option in options(group):
        config = compose(stage, [f"{group}={option}"])
        schema = resolved({"$ref": kinds[config[group]["method"]]}, whole)
        known = {f"{group}.{name}": choices(each, whole) for name, each in leaves(schema, whole)}
        allowed = {name: known.get(name, "") for name in (f"{group}.{key}" for key in config[group])}
        add(keys, option, config, said(CONFIGS / group / f"{option}.yaml", f"{group}."), allowed)
    method = keys[f"{group}.method"]
    method.choices = ", ".join(f"`{each}`" for each in kinds)
    method.defaults = dict.fromkeys(method.defaults, f"`{compose(stage, [])[group]['method']}`")
    return keys


def options(group: str) -> list[str]:
    """The files of a group."""
    return [path.stem for path in sorted((CONFIGS / group).glob("*.yaml"))]


def common(found: dict[str, str]) -> tuple[str, dict[str, str]]:
    """What most variants have in common, and what others have: value -> their names, with commas."""
    most = Counter(found.values()).most_common(1)[0][0] if found else ""
    others: dict[str, list[str]] = {}
    for variant, value in found.items():
        if value != most:
            others.setdefault(value, []).append(variant)
    return most, {value: ", ".join(variants) for value, variants in others.items()}


def row(name: str, key: Key, names: list[str], of: list[str]) -> str:
    """A line of a table. `of`: a cell that says which variants have the key, or none."""
    value, values = common(key.defaults)
    meaning, meanings = common({variant: text for variant, text in key.meanings.items() if text})
    default = "; ".join([value, *(f"{other} ({variants})" for other, variants in values.items())])
    text = ". ".join([meaning, *(f"In {variants}: {other}" for other, variants in meanings.items())])
    return f"| {' | '.join([f'`{name}`', *of, default, key.choices, prose(text, names)])} |"


def prose(text: str, keys: list[str]) -> str:
    """A comment as Markdown: keys as code, choices parted by commas."""
    text = text.replace(" | ", ", ").replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
    dotted = {key for name in keys for key in (name, name.rsplit(".", 1)[0]) if "." in key}
    if not dotted:
        return text
    known = "|".join(re.escape(key) for key in sorted(dotted, key=len, reverse=True))
    return re.sub(rf"(?<![\w.`])({known})(?!\w|\.\w)", r"`\1`", text)


def sections(keys: dict[str, Key]) -> dict[tuple[str, ...], list[str]]:
    """The stages that share keys -> these keys; what more stages share comes first."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, key in keys.items():
        found.setdefault(tuple(stage for stage in STAGES if stage in key.defaults), []).append(name)
    order = list(STAGES)
    return dict(sorted(found.items(), key=lambda item: (-len(item[0]), order.index(item[0][0]))))


def title(names: tuple[str, ...]) -> str:
    *others, last = names
    if len(names) == len(STAGES):
        return "Every stage"
    return f"{', '.join(others)} and {last}" if others else f"`posttrain {last}`"


def section_notes(names: list[str], found: dict[str, Explained]) -> dict[str, str]:
    """Section -> its comment, for sections of these keys that have one."""
    parts = {name.rsplit(".", 1)[0] for name in names if "." in name}
    return {part: found[part].comment for part in parts if part in found and found[part].comment}


def key_tables() -> str:
    """A heading and a table for the keys that the same stages share, then one for each group of methods."""
    keys = stage_keys()
    of_groups = {group: variant_keys(group) for group in VARIANTS}
    names = [*keys, *(name for each in of_groups.values() for name in each)]
    blocks = []
    for shared, found in sections(keys).items():
        notes = section_notes(found, said(CONFIGS / f"{shared[0]}.yaml"))
        lines = [f"### {title(shared)}", "", "| key | default | choices | meaning |", "|---|---|---|---|"]
        for name in found:
            if note := notes.pop(name.rsplit(".", 1)[0], None):
                lines.append(f"| **`{name.rsplit('.', 1)[0]}`** | | | {prose(note, names)} |")
            lines.append(row(name, keys[name], names, []))
        blocks.append("\n".join(lines))
    for group, rows in of_groups.items():
        lines = [f"### `{VARIANTS[group]}`", "", "| key | of | default | choices | meaning |", "|---|---|---|---|---|"]
        for name, key in rows.items():
            of = "all" if len(key.defaults) == len(options(group)) else ", ".join(key.defaults)
            lines.append(row(name, key, names, [of]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def group_tables() -> str:
    """A table for each group: its files, and what the first comment of each says."""
    blocks = []
    for group in GROUPS:
        lines = [f"| `{group}=` | |", "|---|---|"]
        lines += [f"| `{option}` | {prose(header(CONFIGS / group / f'{option}.yaml'), [])} |" for option in options(group)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def page() -> str:
    """The whole page."""
    return TEMPLATE.read_text().replace("{groups}", group_tables()).replace("{keys}", key_tables())


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
