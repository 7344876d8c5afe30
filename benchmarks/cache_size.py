"""Size of the compact cache, of the paper's closed form, and of a dense cache.

  ./workspace bench cache_size

Settings: γ = 0.1, m = 16, min_focal_tokens = 0. The tokens of the compact cache are counted in the
arrays that a prefill returns. Bytes are for LLaMA2-7B in 16 bit (keys and values of 32 layers, 32
KV heads, D = 128).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from absl import app

from benchmarks.timing import environment
from dga_jax import DGAConfig
from dga_jax.cache import cache_size, prefill

BYTES_PER_TOKEN = 2 * 32 * 32 * 128 * 2


def live_tokens(selection: Any, length: int) -> int:
  """Compact entries plus raw slots, counted in the cache arrays that a prefill returns.

  Raises:
    AssertionError: `cache_size` predicts another number.
  """
  config = DGAConfig(selection=selection, min_focal_tokens=0)
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, length, 1, 16))
  fill = functools.partial(prefill, config=config, max_length=length)
  arrays = jax.jit(fill)(k, v, q).arrays
  live = arrays.compact_key.shape[2] + arrays.raw_key.shape[2]
  formula = cache_size(config=config, max_length=length, prompt=length).total
  if live != formula:
    raise AssertionError(
      f"selection {selection}, {length} tokens: the arrays hold {live} tokens; cache_size predicts"
      f" {formula}"
    )
  return live


def main(argv: Sequence[str]) -> None:
  """Prints one table row for each context length."""
  del argv
  print(environment())
  print("| context | closed form | global | streaming | dense | saved (global, streaming) |")
  print("| --- | --- | --- | --- | --- | --- |")
  for length in (4096, 8192, 16384, 32768):
    closed = round(0.1 * length + (length - 0.1 * length) / 16 + 16)
    counts = {name: live_tokens(name, length) for name in ("global", "streaming")}
    columns = [
      f"{tokens} ({tokens * BYTES_PER_TOKEN / 2**30:.2f} GB)"
      for tokens in (closed, counts["global"], counts["streaming"], length)
    ]
    saved = ", ".join(f"{1 - tokens / length:.1%}" for tokens in counts.values())
    print(f"| {length} | {' | '.join(columns)} | {saved} |", flush=True)


if __name__ == "__main__":
  app.run(main)
