"""No key that nothing reads, and none that the YAML forgets."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import posttrain
from posttrain.config import schema
from posttrain.config.interfaces import REGISTRIES
from posttrain.config.paths import root
from posttrain.config.stages import config_classes

PACKAGE = Path(posttrain.__file__).parent


def models() -> set[type[schema.Strict]]:
    names = [f"{schema.__name__}.{each.name}" for each in pkgutil.iter_modules(schema.__path__)]
    names += [each.__module__ for each in config_classes().values()]
    modules = [importlib.import_module(name) for name in names]
    values = [value for module in modules for value in vars(module).values()]
    values += [each for registry in REGISTRIES for entry in registry.all().values() for each in entry.__mro__]
    return {value for value in values if isinstance(value, type) and issubclass(value, schema.Strict)}


def fields() -> set[str]:
    return {name for model in models() for name in model.model_fields}


def attributes_read() -> set[str]:
    """Names that some module reads as an attribute or as a string key."""
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "schema":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                found.add(str(node.slice.value))
    for file in root("configs").rglob("*.yaml"):  # or that a YAML derives another from: ${optim.lr}
        found |= {name.rsplit(".", 1)[-1] for name in re.findall(r"\$\{([\w.]+)\}", file.read_text())}
    return found


def test_every_key_is_read_somewhere() -> None:
    assert sorted(fields() - attributes_read()) == []


def test_defaults_are_in_yaml_alone() -> None:
    assert len(models()) > 30
    assert [(m.__name__, n) for m in models() for n, f in m.model_fields.items() if not f.is_required()] == []
