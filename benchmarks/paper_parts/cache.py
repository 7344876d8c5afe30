"""Size of the cache (Table I of the authors' answers): LLaMA2-7B in 16 bit, γ = 0.1, m = 16."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cache_size import BYTES_PER_TOKEN
from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.published import KV_CACHE_GB
from dga_jax import DGAConfig
from dga_jax.cache import cache_size
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.report import markdown

TASK = "cache"


def make_jobs(inputs: Inputs) -> Iterator[Job]:
  """One job: the tokens of the cache at each length of the authors' table."""
  del inputs
  yield Job(
    fields={"task": TASK},
    depends_on=sorted(KV_CACHE_GB),
    ticks=1,
    run=_run,
    origin="shapes of LLaMA2-7B",
  )


def _run(tick: Callable[[], Any]) -> dict[str, Any]:
  sizes = []
  for length in KV_CACHE_GB:
    tokens = {
      selection: cache_size(
        config=DGAConfig(selection=selection, min_focal_tokens=0), max_length=length, prompt=length
      ).total
      for selection in ("global", "streaming")
    }
    sizes.append({"length": length, "tokens": tokens})
  tick()
  return {"sizes": sizes}


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """The table; no picture."""
  del out
  rows = []
  for size in results[-1]["sizes"]:
    length, tokens = size["length"], size["tokens"]
    dense, published = KV_CACHE_GB[length]
    own = [f"{count} ({count * BYTES_PER_TOKEN / 2**30:.2f} GB)" for count in tokens.values()]
    saved = f"{1 - tokens['global'] / length:.1%}"
    rows.append([str(length), f"{published} GB", *own, f"{dense} GB", saved])
  header = ["context", "paper", "global: tokens", "streaming: tokens", "dense", "saved (global)"]
  return markdown(header, rows)
