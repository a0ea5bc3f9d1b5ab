"""The typed config of every stage there is. Which stages there are is known to the registry alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError
from posttrain.registry import Registry

if TYPE_CHECKING:
    from posttrain.config.schema import Stage

SHARED = (
    "accelerator",
    "help",
    "precision",
    "headline",
    "language",
    "manifest",
    "result",
    "resume",
    "spec",
    "stage",
    "steps",
)  # of stages/, and no stage
# a folder of posttrain.stages with a SPEC, or a package of others; by its name, for configs lie below stages
REGISTRY: Registry[Any] = Registry(
    "posttrain.stages", "posttrain.stages", "SPEC", "stage", shared=SHARED, of="posttrain.stages.spec:StageSpec"
)


def config_classes() -> dict[str, type[Stage]]:
    """Stage -> the pydantic model of its config."""
    return {name: spec.config_class for name, spec in REGISTRY.all().items()}


def typed_config(config: dict[str, Any]) -> Any:
    """The frozen, typed config. Raises pydantic's ValidationError, or UserError where there is no such stage."""
    name = config.get("stage")
    if not isinstance(name, str):
        raise UserError("stage has no value; give the name of a stage")
    return REGISTRY.get(name).config_class.model_validate(config)
