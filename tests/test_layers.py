"""The import rules of the folders, checked on the syntax tree of every file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each folder may import, at module level or inside a function. The standard library is free.
# In dga_jax only the modules in COMMAND_MODULES may import these.
COMMANDS = {"absl", "etils", "jinja2", "orbax", "tokenizers", "tqdm"}
# What folders of dga_jax that read and write files may import in addition.
FILE_LIBRARIES = {
  "audio": {"matplotlib", "soundfile", "soxr"},
  "chat": {"jinja2", "tokenizers"},
  "files": {"absl", "etils", "matplotlib"},
  "calibration": {"matplotlib", "optax", "scipy", "tqdm"},
  "conversion": {"gguf", "safetensors", "tokenizers", "tqdm"},
  "evaluation": {"matplotlib", "tqdm"},
  "serving": {"prometheus_client", "starlette", "uvicorn"},
}
ALLOWED = {
  "pallas_kernels": {"jax", "jaxtyping", "numpy", "pallas_kernels"},
  "dga_jax": {"dga_jax", "flax", "jax", "jaxtyping", "numpy", "pallas_kernels"} | COMMANDS,
  "configs": {"configs", "ml_collections"},
}
ABOVE = {  # Folders that may use any library, and the folders of ours that they may not import.
  "train": {"benchmarks", "configs", "tests"},
  "benchmarks": {"tests"},
}
COMMAND_MODULES = {  # Modules of commands, of text, and modules that read or write files.
  "calibrate",
  "checkpoint",
  "checkpoint_files",
  "checkpoint_logs",
  "checkpoint_manifest",
  "command_line",
  "console",
  "convert",
  "evaluate",
  "fit_selector",
  "flag_help",
  "generate_command",
  "picture",
  "picture_sound",
  "serve",
  "smollm2",
  "smollm2_demo",
  "tokenizer",
}
FOLDERS = sorted(ALLOWED.keys() | ABOVE.keys())


def imported(source: str) -> set[str]:
  """The top-level packages that a module imports, without the standard library."""
  names: set[str] = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      names.add("." if node.level else node.module or "")
  return {name.partition(".")[0] or "a relative import" for name in names} - sys.stdlib_module_names


def forbidden(folder: str, path: Path) -> set[str]:
  """The packages that a file of `folder` imports against the rules."""
  found = imported(path.read_text())
  if folder in ABOVE:
    return found & (ABOVE[folder] | {"a relative import"})
  allowed = ALLOWED[folder]
  if folder == "dga_jax" and path.stem not in COMMAND_MODULES:
    allowed = allowed - COMMANDS | FILE_LIBRARIES.get(path.parent.name, set())
  if folder == "pallas_kernels" and path.stem.startswith("jax_triton_"):
    allowed = allowed | {"jax_triton", "triton"}  # Imported when a call names such a kernel.
  return found - allowed


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_import_only_allowed_packages(folder: str) -> None:
  broken = {
    str(path.relative_to(ROOT)): sorted(names)
    for path in sorted((ROOT / folder).rglob("*.py"))
    if (names := forbidden(folder, path))
  }
  assert not broken


@pytest.mark.parametrize(
  ("folder", "source", "expected"),
  [
    ("pallas_kernels", "import jax, dga_jax.config", {"dga_jax"}),
    ("dga_jax", "def f():\n  from train import setup", {"train"}),
    ("dga_jax", "import absl.logging", {"absl"}),
    ("dga_jax", "import safetensors", {"safetensors"}),
    ("dga_jax", "from . import config", {"a relative import"}),
    ("train", "import optax, os\nfrom configs.quickstart import get_config", {"configs"}),
    ("configs", "import dataclasses\nimport jax\nimport ml_collections", {"jax"}),
  ],
)
def test_forbidden_imports_are_detected(
  folder: str, source: str, expected: set[str], tmp_path: Path
) -> None:
  path = tmp_path / "module.py"
  path.write_text(source)
  assert forbidden(folder, path) == expected
