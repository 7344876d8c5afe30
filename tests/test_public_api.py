"""The public modules: every export exists and is documented, every definition is exported."""

import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import dga_jax

ROOT = Path(__file__).parents[1]
MODULES = [
  "dga_jax",
  "dga_jax.analyse",
  "dga_jax.api",
  "dga_jax.cache",
  "dga_jax.checkpoint",
  "dga_jax.config",
  "dga_jax.flax",
  "dga_jax.generation",
  "dga_jax.model",
]


@pytest.mark.parametrize("name", MODULES)
def test_exports_exist_and_are_documented(name: str) -> None:
  module = importlib.import_module(name)
  assert module.__doc__
  assert len(set(module.__all__)) == len(module.__all__) > 0
  assert set(module.__all__) <= set(dir(module))
  for export in module.__all__:
    value = getattr(module, export)
    if inspect.isclass(value) or inspect.isfunction(value):
      assert inspect.getdoc(value), f"{name}.{export}"


@pytest.mark.parametrize("name", MODULES)
def test_public_definitions_are_exported(name: str) -> None:
  module = importlib.import_module(name)
  own = {
    key
    for key, value in vars(module).items()
    if not key.startswith("_") and getattr(value, "__module__", None) == name
  }
  assert own <= set(module.__all__)


def test_the_version_is_written_once() -> None:
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  assert project["project"]["dynamic"] == ["version"]
  assert "version" not in project["project"]
  assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dga_jax.__version__"}
  assert dga_jax.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error() -> None:
  with pytest.raises(AttributeError, match="module 'dga_jax' has no attribute 'dga_config'"):
    dga_jax.dga_config  # noqa: B018


def test_both_packages_are_typed() -> None:
  for name in ("dga_jax", "pallas_kernels"):
    assert (ROOT / name / "py.typed").is_file()
