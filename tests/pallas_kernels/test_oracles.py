"""Oracles share no code with the implementations that they are compared with."""

import ast
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "pallas_kernels"


def _imported(path: Path) -> set[str]:
  """The modules of `pallas_kernels` that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
  return {name for name in names if name.startswith("pallas_kernels")}


def test_the_reference_imports_only_the_records_of_its_arguments():
  for path in KERNELS.rglob("reference.py"):
    records = f"pallas_kernels.{path.parent.name}.kv_sources"
    assert all(name.startswith(records) for name in _imported(path)), path


def test_no_kernel_imports_a_reference():
  for path in KERNELS.rglob("*.py"):
    assert not any(name.endswith(".reference") for name in _imported(path)), path


def test_no_kernel_imports_the_xla_code_that_tests_compare_it_with():
  for path in KERNELS.rglob("*.py"):
    if path.name.startswith(("triton_", "mosaic_", "jax_triton_")):
      assert not any(name.endswith(".xla") for name in _imported(path)), path
