"""Addresses of object stores: every flag and config key that takes a path refuses them at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dga_jax.checkpoint import load_model
from dga_jax.files.paths import check_path
from train.config import make_config

ROOT = Path(__file__).parents[3]

# Every command with its required flags, and the flags that take a path.
COMMANDS = {
  "dga_jax.generate_command": (
    {"workdir": "run"},
    ["workdir", "prompt_file", "prompt_from", "context", "save_cache", "load_cache"],
  ),
  "dga_jax.convert": ({"workdir": "run"}, ["workdir", "source", "to_hf"]),
  "dga_jax.evaluate": (
    {"workdir": "run", "task": "perplexity"},
    ["workdir", "out", "documents", "longbench", "questions"],
  ),
  "dga_jax.fit_selector": (
    {"workdir": "run", "output": "fitted"},
    ["workdir", "output", "documents"],
  ),
  "dga_jax.picture": ({}, ["output"]),
  "dga_jax.picture_sound": (
    {"workdir": "run", "prompt_audio": "in.wav"},
    ["workdir", "prompt_audio", "output"],
  ),
  "train.quickstart": ({}, ["workdir"]),
  "train.compile_topology": ({"config": f"{ROOT}/configs/quickstart.py"}, ["program"]),
  "train.main": (
    {"workdir": "run", "config": f"{ROOT}/configs/quickstart.py"},
    ["workdir", "config.data.cache_dir"],
  ),
}

REQUIRED = "vocab_size num_layers embed_dim num_heads num_kv_heads head_dim mlp_dim".split()


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket", "file:///run", "gs:/bucket"])
def test_an_address_is_refused_in_one_line(path: str) -> None:
  with pytest.raises(
    ValueError, match=rf"^--workdir is '{path}'; \w+:// is not supported here\. .+$"
  ):
    check_path("--workdir", path)


@pytest.mark.parametrize(
  "path", ["run", "/runs/a", "./gs:/bucket", "c:/runs", "runs/a:b/c", "~/run"]
)
def test_paths_of_the_file_system_are_taken(path: str) -> None:
  check_path("--workdir", path)


def test_the_library_refuses_it_as_well() -> None:
  with pytest.raises(ValueError, match=r"^workdir is 's3://bucket/run'"):
    load_model("s3://bucket/run")
  with pytest.raises(ValueError, match=r"^workdir is 'gs:/bucket/run'"):
    load_model(Path("gs://bucket/run"))


@pytest.mark.parametrize(
  "key", ["init_from", "data.train_files", "data.validation_files", "data.cache_dir"]
)
def test_config_keys(key: str) -> None:
  section, _, name = key.rpartition(".")
  model = dict.fromkeys(REQUIRED, 8)
  # config.init_from may be in Google Cloud Storage.
  for scheme in ("s3", "file", *(["gs"] if section else [])):
    path = f"{scheme}://bucket/a"
    value = ["a.txt", path] if key.endswith("_files") else path
    values = {section: {name: value}} if section else {name: value}
    with pytest.raises(ValueError, match=rf"^config\.{key} is '{path}'; {scheme}:// is not supp"):
      make_config({"model": model, **values})


@pytest.mark.parametrize("module", COMMANDS)
def test_no_command_creates_anything(module: str, tmp_path: Path) -> None:
  required, names = COMMANDS[module]
  for name in names:
    given = required | {name: "s3://bucket/a"}
    done = subprocess.run(
      [sys.executable, "-m", module, *(f"--{key}={value}" for key, value in given.items())],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 1, name
    (line,) = (line for line in done.stderr.splitlines() if "s3:// is not supported" in line)
    assert name.removeprefix("config.") in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
