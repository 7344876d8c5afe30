"""Tests of benchmarks/quality.py on a tiny model: each kind of job runs, and plots are written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _quality_variants as variants
from dga_jax.cache import cache_size
from tests.dga_jax.evaluation.tiny import CONFIG, write_checkpoint, write_documents

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

JOBS = "|".join(
  [
    "perplexity dense 512", "passkey dense 320", "perplexity dense 576", "DGA retrofit",
  ]
)  # fmt: skip


def run(workdir: Path, documents: Path, out: Path, *arguments: str) -> list[str]:
  command = [
    sys.executable, "-m", "benchmarks.quality", f"--workdir={workdir}", f"--documents={documents}",
    f"--out={out}", "--lengths=512", "--passkeys=320", "--long=576", "--targets=4", "--samples=1",
    "--dtype=float32", "--batch_tokens=2048", f"--jobs={JOBS}", *arguments,
  ]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=ENV)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


@pytest.mark.nightly
def test_the_report(tmp_path: Path) -> None:
  workdir = write_checkpoint(tmp_path / "run")
  documents, out = write_documents(tmp_path), tmp_path / "out"
  printed = run(workdir, documents, out, "--minutes=30")
  assert "4 jobs are done, 0 are missing." in printed
  written = [Path(line) for line in printed if line.startswith(str(out))]
  assert len(written) == 13
  assert all(path.stat().st_size > 100 for path in written)
  results = [json.loads(line) for line in (out / "quality.jsonl").read_text().splitlines()]
  assert {result["task"] for result in results} == {"perplexity", "retrieval", "ablation"}
  (ablation,) = (result for result in results if result["task"] == "ablation")
  assert len(ablation["one_layer_dga"]) == len(ablation["one_layer_dense"]) == CONFIG.num_layers
  (long,) = (r for r in results if r["task"] == "perplexity" and r["length"] == 576)
  assert long["depends_on"][0]["rope_base"] == 4e5
  listed = run(workdir, documents, out, "--list")
  assert len(listed) == len(results)
  assert all(line.startswith("done ") for line in listed)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_the_cache_of_dga_has_the_requested_share_of_keys(share: float) -> None:
  for m, focal in ((16, 1), (16, 2), (30, 2)):
    config = variants.config_at_share(8192, share, m, focal)
    if config is None:
      assert (focal + 1) / (m + focal) > 0.9 * share
      continue
    keys = cache_size(config=config, max_length=8192).total
    assert share * 8192 - config.block_size < keys <= share * 8192 + config.block_size


def test_variants_have_unique_names_and_valid_configs() -> None:
  for make_variants in (variants.core, variants.other_shares, variants.grid, variants.switches,
                        variants.paper_settings, variants.long_context):  # fmt: skip
    made = list(make_variants(8192))
    names = [variant.name for variant in made]
    assert len(set(names)) == len(names)
    for variant in made:
      variant.config(CONFIG, 8192)


def test_core_and_grid_cover_every_group_size_and_rate() -> None:
  names = [v.name for make in (variants.core, variants.grid) for v in make(8192)]
  for m in (4, 8, 16):
    for rate in (0.1, 0.2):
      assert any(re.match(rf"DGA global, m={m} γ={rate}", name) for name in names)
      # At m = 4 both rates keep one focal token per block, so only one of them is a variant.
      streaming = any(re.match(rf"DGA streaming, m={m} γ={rate} ", name) for name in names)
      assert streaming == ((m, rate) != (4, 0.2))
