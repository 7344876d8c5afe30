"""Builds the wheel for the tests that install it."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("dga_jax", "pallas_kernels")


def build_wheel(folder: Path) -> Path:
  """The wheel, built in a folder from a copy of the tree, so that it has no old build files."""
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder)
  for name in PACKAGES:
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
  subprocess.run([*command, "--wheel-dir", str(folder / "dist"), str(folder)], check=True)
  (path,) = (folder / "dist").glob("*.whl")
  return path
