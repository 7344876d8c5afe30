"""The command `dga convert`: import, use, export, and wrong flags."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dga_jax.checkpoint import load_config, load_model, load_tokenizer
from dga_jax.config import RETROFIT
from dga_jax.generation import generate, Sampling
from dga_jax.model import ModelConfig
from tests.dga_jax.conversion.folders import copy_of, import_folder, set_keys

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "golden" / "hugging_face" / "smollm"


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", module, *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )


def test_in_and_used_and_out_again(tmp_path: Path) -> None:
  workdir, folder = str(tmp_path / "run"), tmp_path / "out"
  flags = ("--attention=dga", "--dtype=float32", "--end_token=<turn>", "--mesh=tensor=1")
  done = run("dga_jax.convert", f"--source={SOURCE}", f"--workdir={workdir}", *flags)
  assert done.returncode == 0, done.stderr
  assert "weights in bfloat16, attention dga" in done.stdout
  assert f"Calibrate a setting for each KV head: dga calibrate --workdir={workdir} " in done.stdout
  model = ModelConfig.from_dict(load_config(workdir)["model"])
  assert (model.dtype, model.attention, model.dga) == ("float32", "dga", RETROFIT)

  texts = []
  for attention in ("dga", "dense"):
    flags = ("--prompt=the", "--temperature=0", "--max_new_tokens=4", f"--attention={attention}")
    done = run("dga_jax", "generate", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    texts.append(done.stdout.splitlines()[0])
  # The prompt fits the raw window, where DGA equals dense attention.
  assert texts[0] == texts[1]
  assert texts[0].startswith("the")

  done = run("dga_jax.convert", f"--workdir={workdir}", f"--to_hf={folder}")
  assert done.returncode == 0, done.stderr
  before, after = (load_file(f / "model.safetensors") for f in (SOURCE, folder))
  for name, tensor in before.items():
    np.testing.assert_array_equal(tensor, after[name])


def test_what_the_flags_decide(tmp_path: Path) -> None:
  """An unknown key and a template that ends every text are refused unless flags accept them."""
  source = copy_of("smollm", tmp_path)
  set_keys(source / "config.json", note=1)
  set_keys(source / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
  arguments = (f"--source={source}", f"--workdir={tmp_path / 'run'}")
  done = run("dga_jax.convert", *arguments)
  assert done.returncode == 1
  assert "unknown key note=1" in done.stderr
  flags = ("--ignore_keys=note", "--noadd_eos_token", "--noadd_bos_token", "--param_dtype=float16")
  done = run("dga_jax.convert", *arguments, *flags)
  assert done.returncode == 0, done.stderr
  assert "weights in float16" in done.stdout
  assert load_tokenizer(tmp_path / "run").start_ids == ()


def test_the_generate_command_stops_on_every_end_of_the_files(tmp_path: Path) -> None:
  source = copy_of("smollm", tmp_path)
  import_folder(source, tmp_path / "plain", dtype="float32")
  model, _, tokenizer = load_model(tmp_path / "plain")
  prompt = [*tokenizer.start_ids, *tokenizer.encode("the axe")]
  greedy = Sampling(temperature=0.0)
  (tokens,) = generate(model, [prompt], max_new_tokens=6, sampling=greedy).tokens
  assert tokens[1] != tokens[0]
  set_keys(source / "generation_config.json", eos_token_id=[2, tokens[1]])
  import_folder(source, tmp_path / "run", dtype="float32")
  flags = ("--prompt=the axe", "--temperature=0", "--max_new_tokens=6")
  done = run("dga_jax", "generate", f"--workdir={tmp_path / 'run'}", *flags)
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"the axe{tokenizer.decode(tokens[:1])}\n"


@pytest.mark.parametrize(
  ("arguments", "status", "message"),
  [
    ([], 1, "Give one of --source"),
    (["--source=nowhere"], 1, "error: There is no Hugging Face folder or GGUF file at nowhere."),
  ],
)
def test_what_a_user_gets_wrong(
  arguments: list[str], status: int, message: str, tmp_path: Path
) -> None:
  done = run("dga_jax.convert", f"--workdir={tmp_path}", *arguments)
  assert done.returncode == status
  assert message in done.stderr + done.stdout
  assert "Traceback" not in done.stderr
