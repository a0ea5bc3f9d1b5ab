"""Tests whose reference is newer than the lowest versions that pyproject.toml allows."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(library: str, lowest: str, why: str) -> pytest.MarkDecorator:
    """Skips with an older one. Only where the reference is what fails there: if our own does, the bound is raised.

    why: what older ones do otherwise.
    """
    return pytest.mark.skipif(Version(version(library)) < Version(lowest), reason=f"needs {library} {lowest}: {why}")
