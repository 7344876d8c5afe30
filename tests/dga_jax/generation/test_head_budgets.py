"""Generation by a model whose KV heads have settings of their own; the flag --budgets."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from dga_jax import DGAConfig, HeadBudgets
from dga_jax.generation import console, ContinuousBatching, Request, Sampling
from dga_jax.model import apply_budgets, Decoder, ModelConfig
from tests.dga_jax.evaluation.tiny import CONFIG, write_checkpoint

ROOT = Path(__file__).parents[3]
GREEDY = Sampling(temperature=0.0)
BLOCKS = DGAConfig(selection="streaming", group_size=5, sink_tokens=2, local_window=1)
BUDGETS = HeadBudgets(("full", BLOCKS), ((1, 0), (1, 1)))


@pytest.fixture(scope="module")
def model():
  config = ModelConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    dtype="float32",
  )
  return apply_budgets(Decoder(config, rngs=nnx.Rngs(0)), BUDGETS)


def test_tokens_depend_neither_on_neighbours_nor_on_chunks(model):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 61, n).tolist() for n in (1, 13, 40)]
  requests = [Request(prompt, 9, GREEDY) for prompt in prompts]
  together = ContinuousBatching(model, requests, slots=2).run().tokens
  assert [len(tokens) for tokens in together] == [9, 9, 9]
  in_chunks = ContinuousBatching(model, requests[1:], slots=1, prompt_chunk=8).run().tokens
  assert in_chunks == together[1:]


def test_generate_applies_the_budgets_of_a_file(tmp_path, capsys):
  """With every head full, the text is that of dense attention."""
  workdir = str(write_checkpoint(tmp_path / "run"))
  everything = HeadBudgets(("full",), ((0,) * CONFIG.num_kv_heads,) * CONFIG.num_layers)
  (tmp_path / "budgets.json").write_text(everything.to_json())

  def generate(*flags):
    command = [sys.executable, "-m", "dga_jax", "generate", f"--workdir={workdir}"]
    options = ["--prompt=The carrier", "--max_new_tokens=12", "--temperature=0"]
    return subprocess.run(
      [*command, *options, *flags],
      check=False,
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )

  done = generate(f"--budgets={tmp_path / 'budgets.json'}")
  assert done.returncode == 0, done.stderr
  loaded = console.load(workdir, attention="dense")
  batch = console.make_batch(loaded, ["The carrier"], GREEDY, max_new_tokens=12, stream=True)
  console.print_stream(batch, loaded.tokenizer, "The carrier")
  text, statistics, _ = capsys.readouterr().out.partition("prefill ")
  assert statistics
  assert done.stdout.startswith(text)
  (tmp_path / "wrong.json").write_text("{}")
  refused = generate(f"--budgets={tmp_path / 'wrong.json'}")
  assert refused.returncode == 1
  assert "wrong.json holds no head budgets" in refused.stderr
