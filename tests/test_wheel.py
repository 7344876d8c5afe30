"""The wheel, installed in a fresh environment with the newest versions that it allows.

All commands run outside the checkout. pip downloads packages from its index, so these tests run
only in `./workspace test-wheel`.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wheel import build_wheel, PACKAGES

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "hugging_face" / "smollm"

pytestmark = pytest.mark.wheel


class Installed:
  """A virtual environment with the wheel, and an empty working folder for its commands."""

  def __init__(self, wheel: Path, folder: Path) -> None:
    self.wheel, self.folder = wheel, folder / "somewhere"
    self.folder.mkdir()
    self._venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(self._venv)], check=True)

  def install(self, extras: str = "") -> None:
    """Installs the wheel with the versions that pip selects, the newest that the wheel allows."""
    pip = [self._bin("python"), "-m", "pip", "install", "--no-input", "--quiet"]
    pip += ["--disable-pip-version-check", f"{self.wheel}{extras}"]
    subprocess.run(pip, check=True)

  def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
      [self._bin(command), *arguments],
      cwd=self.folder,
      env=environment | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=False,
    )

  def succeed(self, command: str, *arguments: str) -> str:
    """Runs a command, asserts that it succeeds, and returns its output."""
    done = self.run(command, *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout

  def _bin(self, name: str) -> str:
    return str(self._venv / "bin" / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return build_wheel(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
  """The wheel without extras. Later tests of this module install the extras."""
  installed = Installed(wheel, tmp_path_factory.mktemp("installed"))
  installed.install()
  yield installed
  shutil.rmtree(installed.folder.parent)


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
  names = zipfile.ZipFile(wheel).namelist()
  folders = {name.partition("/")[0] for name in names}
  assert {folder for folder in folders if not folder.endswith(".dist-info")} == set(PACKAGES)
  for name in ("dga_jax/py.typed", "pallas_kernels/py.typed", "dga_jax/serving/index.html"):
    assert name in names
  tracked = {
    str(path.relative_to(ROOT))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  assert tracked <= set(names)
  assert any(name.endswith("LICENSE") for name in names)


def test_the_newest_jax_is_installed(installed: Installed) -> None:
  requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
  (jax,) = (one for one in requirements if one.startswith("jax>"))
  bound = jax.partition(",<")[2].split(".")
  code = "import jax; print(jax.__version__)"
  version = installed.succeed("python", "-c", code).strip()
  assert int(version.split(".")[1]) == int(bound[1]) - 1, version


def test_the_op_and_its_gradients(installed: Installed) -> None:
  installed.succeed(
    "python",
    "-W", "error",
    "-c",
    """
import jax, jax.numpy as jnp
from dga_jax import DGAConfig, dynamic_group_attention

q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 40, 2, 8))
for config in (
  DGAConfig(group_size=4, min_focal_tokens=8),
  DGAConfig(group_size=4, selection="streaming"),
):
  def loss(q, k, v, implementation):
    o = dynamic_group_attention(q, k, v, config=config, implementation=implementation)
    return jnp.sum(jnp.sin(o))
  grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
  ours, reference = (jax.tree.leaves(grad(q, k, v, name)) for name in (None, "reference"))
  assert all(jnp.allclose(a, b, atol=1e-4) for a, b in zip(ours, reference, strict=True))
""",
  )  # fmt: skip


def test_the_commands(installed: Installed) -> None:
  listed = installed.succeed("dga")
  assert listed == installed.succeed("python", "-m", "dga_jax")
  version = installed.succeed("python", "-c", "import dga_jax; print(dga_jax.__version__)")
  assert installed.succeed("dga", "--version") == version
  names = (
    "generate",
    "serve",
    "convert",
    "evaluate",
    "calibrate",
    "fit_selector",
    "smollm2",
    "train",
  )
  for name in names:
    assert f"  {name}" in listed
    assert installed.succeed("dga", name, "--help")
  training = installed.run("dga", "train", "--config=configs/quickstart.py")
  assert training.returncode == 1
  assert "training runs from a checkout" in training.stderr


@pytest.mark.parametrize(
  ("extra", "arguments"),
  [
    ("convert", ("convert", f"--source={MODEL}", "--workdir=run")),
    ("evaluate", ("evaluate", "--workdir=run", "--task=perplexity", "--documents=a.jsonl")),
    ("serve", ("serve", "--workdir=run")),
  ],
)
def test_a_missing_extra_names_itself(
  extra: str, arguments: tuple[str, ...], installed: Installed
) -> None:
  done = installed.run("dga", *arguments)
  assert done.returncode == 1
  assert f'pip install "dga-jax[{extra}]"' in done.stderr
  assert "Traceback" not in done.stderr


def test_convert_generate_and_evaluate(installed: Installed) -> None:
  installed.install("[convert,evaluate]")
  (installed.folder / "a.jsonl").write_text(json.dumps({"id": "a", "text": "the key of " * 99}))
  made = installed.succeed("dga", "convert", f"--source={MODEL}", "--workdir=run")
  assert "run holds the model" in made
  text = installed.succeed(
    "dga", "generate", "--workdir=run", "--prompt=the", "--max_new_tokens=4", "--attention=dga"
  )
  assert text.startswith("the")
  measured = installed.succeed(
    "dga", "evaluate", "--workdir=run", "--task=perplexity", "--documents=a.jsonl",
    "--lengths=64", "--targets=8",
  )  # fmt: skip
  assert (installed.folder / measured.split()[0]).read_text().startswith("| variant |")
  installed.succeed("dga", "convert", "--workdir=run", "--to_hf=exported")
  assert (installed.folder / "exported" / "model.safetensors").is_file()
