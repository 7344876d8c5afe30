"""The recipes in docs/examples run, and their differences are rounding."""

import importlib.util
import re
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
DIFFERENCE = re.compile(r"^\d\.\de[-+]\d\d$", re.MULTILINE)


def test_there_is_a_recipe_for_each_library() -> None:
  assert EXAMPLES == [
    "digits_encoder.py",
    "equinox_module.py",
    "flax_linen.py",
    "flax_nnx.py",
    "plain_jax_cache.py",
  ]


def test_the_encoder_learns_bars_by_their_place() -> None:
  """Images of one bright bar, one of 4 columns; the example itself trains for minutes."""
  example = runpy.run_path(str(FOLDER / "digits_encoder.py"))
  labels = np.arange(256) % 4
  images = 0.3 * np.random.default_rng(0).normal(size=(256, 4, 4))
  images[np.arange(256), :, labels] += 1
  pixels = images.reshape(256, 16).astype(np.float32)
  model = example["train"](example["ATTENTION"]["dga"], pixels, labels, steps=24, seed=0)
  found = np.asarray(example["classify"](model, jnp.asarray(pixels[:64])))
  assert (found == labels[:64]).mean() > 0.8


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"digits_encoder.py"}))
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
