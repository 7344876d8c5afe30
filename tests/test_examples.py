"""The recipes in docs/examples run, and their differences are rounding."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
DIFFERENCE = re.compile(r"^\d\.\de[-+]\d\d$", re.MULTILINE)


def test_there_is_a_recipe_for_each_library() -> None:
  assert EXAMPLES == ["equinox_module.py", "flax_linen.py", "flax_nnx.py", "plain_jax_cache.py"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
  if name.startswith("equinox") and importlib.util.find_spec("equinox") is None:
    pytest.skip("equinox is not installed; it is no dependency of this project")
  runpy.run_path(str(FOLDER / name))
  printed = capsys.readouterr().out
  differences = [float(found) for found in DIFFERENCE.findall(printed)]
  assert all(difference < 1e-5 for difference in differences)
  assert bool(differences) == (name != "flax_linen.py")
  if not differences:
    assert re.search(
      r"loss 0\.\d*[1-9]\d*, gradient of \['key', 'out', 'query', 'value'\]", printed
    )
