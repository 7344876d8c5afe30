"""The notebook in a runtime without dga-jax: an empty folder, and a wheel built from the tree."""

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.wheel import build_wheel

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "dga_quickstart.ipynb"

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return build_wheel(tmp_path_factory.mktemp("build"))


type Run = Callable[[str], tuple[nbformat.NotebookNode, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
  """Runs the notebook in an empty folder with a kernel that has all packages but dga-jax.

  Returns the notebook with its outputs, and the id of the cell that failed, "" for none.
  """
  environment, empty = tmp_path / "environment", tmp_path / "empty"
  empty.mkdir()
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
  python = environment / "bin" / "python"
  ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
  target = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
  for path in Path(sysconfig.get_path("purelib")).iterdir():
    if "dga_jax" not in path.name and path.suffix != ".pth":
      (target / path.name).symlink_to(path)

  specs = tmp_path / "data" / "kernels" / "empty"
  specs.mkdir(parents=True)
  argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
  spec = {"argv": argv, "display_name": "empty", "language": "python"}
  (specs / "kernel.json").write_text(json.dumps(spec))
  for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR"):
    monkeypatch.setenv(name, str(tmp_path / name))
  monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.delenv("MPLBACKEND", raising=False)
  monkeypatch.delenv("PYTHONPATH", raising=False)

  def run(source: str) -> tuple[nbformat.NotebookNode, str]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.id == "install")
    assert cell.source.count('SOURCE = ""') == 1
    cell.source = cell.source.replace('SOURCE = ""', f"SOURCE = {source!r}")
    client = NotebookClient(
      notebook, timeout=600, kernel_name="empty", resources={"metadata": {"path": str(empty)}}
    )
    try:
      client.execute()
    except CellExecutionError:
      failed = [cell.id for cell in notebook.cells if _error(cell)]
      assert len(failed) == 1
      return notebook, failed[0]
    return notebook, ""

  return run


def _error(cell: nbformat.NotebookNode) -> list[str]:
  """The lines that a failed cell shows."""
  outputs = cell.get("outputs", [])
  return [line for one in outputs if one.output_type == "error" for line in one.traceback]


def cell_of(notebook: nbformat.NotebookNode, cell_id: str) -> nbformat.NotebookNode:
  return next(cell for cell in notebook.cells if cell.id == cell_id)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("", "Missing: dga-jax. Fill in SOURCE: a wheel of dga-jax, or the address of its repository."),
    ("none.whl", "Missing: there is no wheel at none.whl."),
    ("./nothing.git", "Missing: git could not clone ./nothing.git: "),
  ],
)
def test_one_line_says_what_is_missing(source: str, message: str, run: Run) -> None:
  notebook, failed = run(source)
  assert failed == "install"
  (line,) = _error(cell_of(notebook, failed))
  assert line.startswith(message)


def test_a_wheel_runs_all_but_the_training(wheel: Path, run: Run) -> None:
  notebook, failed = run(str(wheel))
  assert failed == "config"
  (line,) = _error(cell_of(notebook, failed))
  assert line == (
    "Missing: the trainer, which is not in the wheel. Give SOURCE the address of the repository."
  )
  for cell_id in ("mask", "merge", "cache"):
    plots = [o for o in cell_of(notebook, cell_id).outputs if "image/png" in o.get("data", ())]
    assert len(plots) == 1
  printed = "".join(one.get("text", "") for one in cell_of(notebook, "op").outputs)
  assert "all focal" in printed
  version = importlib.metadata.version("dga-jax")
  assert version in wheel.name
