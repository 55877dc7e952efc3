"""What the package imports is declared, and every extra that an error names exists."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted((ROOT / "jaxllm").rglob("*.py"))


def plain(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


@pytest.mark.fast
def test_every_import_is_declared():
    extras = [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
    declared = {plain(item) for item in PROJECT["dependencies"] + extras}
    providers = packages_distributions()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {name.partition(".")[0] for name in names} - {"jaxllm", "pydantic_core"}:
                found = {plain(item) for item in providers.get(name, [name])}
                assert name in sys.stdlib_module_names or found & declared, f"{file}: {name} is not declared"


@pytest.mark.fast
def test_every_extra_that_an_error_names_exists():
    named = {name for file in FILES for name in re.findall(r"MissingExtra\([^)]*\"(\w+)\"\)", file.read_text())}
    assert named and named <= set(PROJECT["optional-dependencies"])


@pytest.mark.fast
def test_libraries_that_change_have_an_upper_bound():
    bounded = {plain(item) for item in PROJECT["dependencies"] if "<" in item}
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= bounded
