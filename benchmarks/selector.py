"""Perplexity of a pretrained model under each choice of focal tokens, at equal keys.

  python -m dga_jax.convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
  python -m benchmarks.selector --workdir=runs/smollm2 --fit_documents=some.jsonl \
    --documents=others.jsonl --length=2048 --windows=4 --out=runs/selector.jsonl

The selector is fitted to --fit_documents. Then every choice selects the focal tokens of the same
blocks in rows of --documents, in all layers:

  last_query   the attention of the block's last query (`DGAConfig.selector`)
  accumulated  the attention of all queries of the block, each over the block's earlier tokens
  random       drawn
  fitted       the fitted selector
  oracle       the mean attention of later queries beyond the raw window, which decoding cannot know

The table has the perplexity of the second half of the rows over that of dense attention. Each
result is appended to OUT when it is measured, and the same command continues an interrupted run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks._forward import embed, run_layers
from benchmarks.timing import environment
from dga_jax.api import dynamic_group_attention
from dga_jax.calibration.selector_fit import (
  attend_and_rate,
  beyond_window,
  fit_selector,
  FitBlocks,
)
from dga_jax.calibration.selector_weights import with_selector
from dga_jax.checkpoint import abstract_decoder, load_model
from dga_jax.config import DGAConfig
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.files.path_flags import define_path
from dga_jax.model import Decoder, ModelConfig

_WORKDIR = define_path("workdir", None, "Checkpoint of the model.", required=True)
_FIT = flags.DEFINE_list("fit_documents", None, "Texts of the fit: .jsonl or .txt.", required=True)
_DOCUMENTS = flags.DEFINE_list("documents", None, "Texts of the test, others.", required=True)
_OUT = define_path("out", None, "JSON lines of the results.", required=True)
_FIT_ROWS = flags.DEFINE_integer("fit_rows", 2, "Rows of the fit, one of each text.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 2, "Rows of the test, one of each text.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens of a row.", lower_bound=64)
_BLOCKS = flags.DEFINE_list("blocks", ["30+2"], "Blocks of m merged and f focal tokens, as m+f.")
_WINDOWS = flags.DEFINE_list("windows", ["4", "38"], "Raw blocks before a query's own.")
_CHOICES = flags.DEFINE_list(
  "choices", ["last_query", "accumulated", "random", "fitted", "oracle"], "Choices to measure."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["bfloat16", "float32"], "Dtype to compute in; GPUs need bfloat16 for speed."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choice.")


def main(argv: Sequence[str]) -> None:
  """Measures what is missing in OUT and prints the table."""
  del argv
  results = Results(Path(_OUT.value))
  base, _, tokenizer = load_model(_WORKDIR.value)
  base = _dense_in_dtype(base)
  rows, fit_rows = (
    token_rows(read_documents(paths)[:count], tokenizer, _LENGTH.value)
    for paths, count in ((_DOCUMENTS.value, _ROWS.value), (_FIT.value, _FIT_ROWS.value))
  )
  print(environment())
  measure = _Measurer(results, rows)
  dense = measure("dense", lambda: base, None)
  print("| blocks, w | choice | perplexity over dense |\n| --- | --- | --- |")
  for blocks in _BLOCKS.value:
    for window in map(int, _WINDOWS.value):
      members, focal = map(int, blocks.split("+"))
      config = DGAConfig(
        selection="streaming",
        group_size=members,
        focal_per_block=focal,
        sink_tokens=4,
        local_window=window,
        selector="fitted",
      )
      fit = functools.partial(_fit, base, config, fit_rows[:, :-1])
      for choice in _CHOICES.value:
        key = f"{blocks} w={window} {choice}"
        make_model = fit if choice == "fitted" else lambda: base
        loss = measure(key, make_model, _attend(choice, config))
        print(f"| {blocks}, {window} | {choice} | {math.exp(loss - dense):.4f} |", flush=True)


def _fit(base: Decoder, config: DGAConfig, rows: np.ndarray) -> Decoder:
  return with_selector(base, config, fit_selector(base, config, rows))


class _Measurer:
  """Mean loss of the second half of the rows, in nats; results of the file are not repeated."""

  def __init__(self, results: Results, rows: Int[np.ndarray, "B T"]) -> None:
    self._results, self._rows = results, rows

  def __call__(self, name: str, make_model: Callable[[], Decoder], attend: Any) -> float:
    key = f"{name} {_LENGTH.value} tokens {_DTYPE.value}"
    if key not in self._results:
      split = nnx.split(make_model())
      losses = [float(_loss(*split, row[None], attend)) for row in self._rows]
      self._results.add(key, {"losses": losses})
    return float(np.mean(self._results[key]["losses"]))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _loss(graphdef: nnx.GraphDef, params: Any, row_1xT: Array, attend: Any) -> Array:
  model, tokens = nnx.merge(graphdef, params), row_1xT[:, :-1]
  states, _ = run_layers(model, embed(model, tokens), attend or _dense)
  L = tokens.shape[1]
  logits = jax.nn.log_softmax(model.unembed(states[:, L // 2 :]), axis=-1)
  return -jnp.take_along_axis(logits, row_1xT[:, L // 2 + 1 :, None], axis=-1).mean()


def _dense(
  q: Array, k: Array, v: Array, caches: Any, layer: Array, scores: Array | None = None
) -> tuple[Array, None]:
  return attend_and_rate(q, k, v, np.full(q.shape[1], q.shape[1]))[0], None


@functools.cache
def _attend(choice: str, config: DGAConfig) -> Any:
  if choice == "last_query":
    config = dataclasses.replace(config, selector="last_query")

  def attend(
    q: Array, k: Array, v: Array, caches: Any, layer: Array, scores: Array | None = None
  ) -> tuple[Array, None]:
    if choice == "random":
      key = jax.random.fold_in(jax.random.key(_SEED.value), layer)
      scores = jax.random.uniform(key, k.shape[:3])
    elif choice == "accumulated":
      scores = accumulated(q, k, config)
    elif choice == "oracle":
      blocks = FitBlocks.of_row(q.shape[1], config)
      scores = attend_and_rate(q, k, v, beyond_window(q.shape[1], blocks))[1]
    elif choice == "last_query":
      scores = None
    return dynamic_group_attention(q, k, v, config=config, focal_scores=scores), None

  return attend


def accumulated(
  q_BxLxHxD: Float[Array, "B L H D"], k_BxLxNxD: Float[Array, "B L N D"], config: DGAConfig
) -> Float[Array, "B L N"]:
  """Attention of each query to the tokens of its block up to itself, summed over the queries.

  The sums are float32. Tokens outside of complete blocks get 0.
  """
  B, L, H, D = q_BxLxHxD.shape
  N, s = k_BxLxNxD.shape[2], config.block_size
  blocks = (L - config.sink_tokens) // s
  inside = slice(config.sink_tokens, config.sink_tokens + blocks * s)
  q = q_BxLxHxD[:, inside].reshape(B, blocks, s, N, H // N, D)
  k = k_BxLxNxD[:, inside].reshape(B, blocks, s, N, D)
  products = jnp.einsum("bgcnrd,bgjnd->bgnrcj", q, k, preferred_element_type=jnp.float32)
  logits = products * D**-0.5
  logits = jnp.where(jnp.tri(s, dtype=bool)[None, None, None, None], logits, -jnp.inf)
  sums = jax.nn.softmax(logits, axis=-1).sum(axis=(3, 4))
  sums_BxTxN = jnp.moveaxis(sums, 2, 3).reshape(B, blocks * s, N)
  after = L - inside.stop
  return jnp.pad(sums_BxTxN, ((0, 0), (config.sink_tokens, after), (0, 0)))


def _dense_in_dtype(model: Decoder) -> Decoder:
  changes = {"dtype": _DTYPE.value, "attention": "dense"}
  config = ModelConfig.from_dict(model.config.to_dict() | changes)
  changed: Decoder = nnx.merge(abstract_decoder(config)[0], nnx.state(model, nnx.Param))
  return changed


if __name__ == "__main__":
  app.run(main)
