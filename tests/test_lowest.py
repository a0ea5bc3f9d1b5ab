"""The lower bounds in pyproject.toml: each is one that `make lowest` can install, and what is installed here is within them."""

from importlib.metadata import version

from packaging.requirements import Requirement
from packaging.version import Version

from lowest import NOT_LOWERED, lowest


def test_every_dependency_has_a_lowest_version_that_is_below_ours() -> None:
    pins = [Requirement(each) for each in lowest()]
    assert len(pins) >= 20 and not {each.name for each in pins} & set(NOT_LOWERED)
    above = {each.name: str(each.specifier) for each in pins if Version(version(each.name)) < Version(str(each.specifier)[2:])}
    assert above == {}
