"""The notebook: its imports resolve. The nightly tests also run it in a kernel of its own."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "dga_quickstart.ipynb"


# Execution takes minutes.
nightly = pytest.mark.nightly


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
  """The executed notebook, with a few training steps, started in the folder of the notebook."""
  folder = tmp_path_factory.mktemp("notebook")
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("DGA_NOTEBOOK_STEPS", "8")
    patch.setenv("DGA_NOTEBOOK_WORKDIR", str(folder / "run"))
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # Use this environment's kernel with inline plots and without a user's settings.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
      patch.setenv(name, str(folder / name))
    patch.delenv("MPLBACKEND", raising=False)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    # An error in a cell raises an exception with the cell and its traceback.
    return NotebookClient(notebook, timeout=300, resources=where).execute()


def outputs(notebook: nbformat.NotebookNode, cell_id: str) -> list[nbformat.NotebookNode]:
  return next(cell for cell in notebook.cells if cell.id == cell_id).outputs


def printed(notebook: nbformat.NotebookNode, cell_id: str, stream: str = "stdout") -> str:
  return "".join(
    output.text for output in outputs(notebook, cell_id) if output.get("name") == stream
  )


@nightly
@pytest.mark.parametrize("cell_id", ["mask", "merge", "loss", "cache"])
def test_plots(executed: nbformat.NotebookNode, cell_id: str) -> None:
  plots = [output for output in outputs(executed, cell_id) if "image/png" in output.get("data", ())]
  assert len(plots) == 1
  assert len(plots[0].data["image/png"]) > 10_000


@nightly
def test_nothing_is_installed_inside_a_checkout(executed: nbformat.NotebookNode) -> None:
  assert outputs(executed, "install") == []


@nightly
def test_the_op_differs_from_dense_attention_unless_all_tokens_are_focal(
  executed: nbformat.NotebookNode,
) -> None:
  line = re.compile(r"^(\w[\w ]*\w) +\d+ focal .* (\S+) away", re.MULTILINE)
  errors = {name: float(error) for name, error in line.findall(printed(executed, "op"))}
  assert list(errors) == ["global", "streaming", "random", "all focal"]
  assert errors["all focal"] < 1e-5 < 1e-2 < min(errors["global"], errors["streaming"])
  assert max(errors["global"], errors["streaming"]) < errors["random"]


@nightly
def test_training_lowers_the_held_out_loss(executed: nbformat.NotebookNode) -> None:
  log = printed(executed, "train", "stderr")
  assert "step 8/8  loss" in log
  assert "WARNING" not in log.upper()
  losses = re.findall(r"at step (\d+): ([\d.]+) nats", printed(executed, "loss"))
  assert [step for step, _ in losses] == ["0", "8"]
  assert float(losses[1][1]) < float(losses[0][1])


@nightly
def test_generation_shows_text_and_the_cache(executed: nbformat.NotebookNode) -> None:
  text = printed(executed, "generate")
  assert text.startswith("class Connection:")
  ratio = re.search(r"cache .*, dense would be .* \(([\d.]+) times\)", text)
  assert ratio is not None
  assert float(ratio[1]) > 3


def test_it_is_stored_without_outputs() -> None:
  cells = nbformat.read(NOTEBOOK, as_version=4).cells
  code = [cell for cell in cells if cell.cell_type == "code"]
  assert code
  assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_its_imports_resolve() -> None:
  cells = nbformat.read(NOTEBOOK, as_version=4).cells
  imported = 0
  for cell in cells:
    if cell.cell_type != "code":
      continue
    code = "\n".join(
      "pass" if line.strip()[:1] in ("!", "%") else line for line in cell.source.split("\n")
    )
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.ImportFrom):
        module = importlib.import_module(node.module or "")
        for alias in node.names:
          if not hasattr(module, alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")
          imported += 1
  assert imported > 15
