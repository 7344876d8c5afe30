"""The report on a tiny model: every kind of cell runs, and what is drawn is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _quality_variants as variants_of
from dga_jax.cache import cache_size
from tests.dga_jax.evaluation.tiny import CONFIG, write_checkpoint, write_documents

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


WANTED = "|".join(
  [
    "perplexity dense 512", "passkey dense 320", "perplexity dense 576", "DGA retrofit",
  ]
)  # fmt: skip


def run(workdir: Path, documents: Path, out: Path, *arguments: str) -> list[str]:
  command = [
    sys.executable, "-m", "benchmarks.quality", f"--workdir={workdir}", f"--documents={documents}",
    f"--out={out}", "--lengths=512", "--passkeys=320", "--long=576", "--targets=4", "--samples=1",
    "--dtype=float32", "--batch_tokens=2048", f"--cells={WANTED}", *arguments,
  ]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=ENV)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_the_report(tmp_path: Path) -> None:
  workdir = write_checkpoint(tmp_path / "run")
  documents, out = write_documents(tmp_path), tmp_path / "out"
  printed = run(workdir, documents, out, "--minutes=30")
  assert "4 cells are there, 0 are missing." in printed
  drawn = [Path(line) for line in printed if line.startswith(str(out))]
  assert len(drawn) == 13
  assert all(path.stat().st_size > 100 for path in drawn)
  records = [json.loads(line) for line in (out / "quality.jsonl").read_text().splitlines()]
  assert {record["task"] for record in records} == {"perplexity", "retrieval", "ablation"}
  (ablation,) = (record for record in records if record["task"] == "ablation")
  assert len(ablation["one_layer_dga"]) == len(ablation["one_layer_dense"]) == CONFIG.num_layers
  (long,) = (r for r in records if r["task"] == "perplexity" and r["length"] == 576)
  assert long["depends_on"][0]["rope_base"] == 4e5
  listed = run(workdir, documents, out, "--list")
  assert len(listed) == len(records)
  assert all(line.startswith("done ") for line in listed)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_dga_fills_its_share(share: float) -> None:
  for m, focal in ((16, 1), (16, 2), (30, 2)):
    config = variants_of.at_share(8192, share, m, focal)
    if config is None:
      assert (focal + 1) / (m + focal) > 0.9 * share
      continue
    keys = cache_size(config=config, max_length=8192).total
    assert share * 8192 - config.block_size < keys <= share * 8192 + config.block_size


def test_names_of_variants_are_unique_and_make_configs() -> None:
  for some in (variants_of.core, variants_of.shares, variants_of.grid, variants_of.switches,
               variants_of.papers, variants_of.long):  # fmt: skip
    variants = list(some(8192))
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names)
    for variant in variants:
      variant.config(CONFIG, 8192)


def test_the_grid_is_whole() -> None:
  names = [v.name for some in (variants_of.core, variants_of.grid) for v in some(8192)]
  for m in (4, 8, 16):
    for rate in (0.1, 0.2):
      pattern = re.compile(rf"DGA global, m={m} γ={rate}")
      assert any(map(pattern.match, names))
