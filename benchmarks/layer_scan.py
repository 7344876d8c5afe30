"""Ways to run layers with different numbers of full heads: compilation and memory of a train step.

  ./workspace bench layer_scan --way=switch --remat=full

The gradient of 30 layers of SmolLM2-135M's shapes (9 query heads, 3 KV heads) on one sequence, of
which 15 of 90 KV heads, drawn at random, stay full and the others follow blocks of 30 + 2 with 4
sinks and 4 raw blocks. Nothing runs: the program is traced, lowered and compiled for this device.
CPU seconds are those of all threads, so that other processes do not change them.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.timing import environment
from dga_jax import DGAConfig, HeadBudgets
from dga_jax.attention.segments import find_documents
from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.attention_kinds.head_budgets import HeadBudgetsAttention
from dga_jax.model.rope import rope_table
from dga_jax.model.run_layers import run_stacked, run_unstacked

_WAYS = ("dga", "dense", "switch", "stored_switch", "padding", "runs", "unrolled")
_WAY = flags.DEFINE_enum(
  "way",
  "switch",
  _WAYS,
  "dga, dense: all heads alike; switch: as the decoder does; stored_switch: without its "
  "recomputation of attention; padding: every layer computes every head both ways; runs: one scan "
  "for each run of equal layers; unrolled: no scan.",
)
_REMAT = flags.DEFINE_enum("remat", "none", ["none", "full"], "See ModelConfig.remat.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of the sequence.", lower_bound=1)

LAYERS, HEADS, KV_HEADS = 30, 9, 3
WINDOW = DGAConfig(
  selection="streaming", group_size=30, focal_per_block=2, sink_tokens=4, local_window=4
)


def assignment(way: str) -> tuple[tuple[int, ...], ...]:
  """0 for a full head, 1 for another; the classes of a layer are adjacent."""
  if way in ("dga", "dense"):
    return ((int(way == "dga"),) * KV_HEADS,) * LAYERS
  other = np.ones(LAYERS * KV_HEADS, int)
  other[np.random.default_rng(0).permutation(other.size)[:15]] = 0
  return tuple(tuple(sorted(row)) for row in other.reshape(LAYERS, KV_HEADS).tolist())


def layer_stack(config: ModelConfig, way: str) -> tuple[Any, Callable[..., jax.Array]]:
  """The abstract parameters of the layers, and a function of them and of the residual stream."""
  abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  model = abstract if way != "unrolled" else nnx.eval_shape(abstract.unstack_layers)
  structure, params = nnx.split(model.layers)
  kind = config.make_attention()
  assert isinstance(kind, HeadBudgetsAttention)

  def run(params: Any, x_BxLxE: jax.Array) -> jax.Array:
    B, L, _ = x_BxLxE.shape
    positions_BxL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    rope = rope_table(positions_BxL, config.rope_frequencies())
    metadata = kind.prepare(find_documents(B, L, None, None))

    def attend(q: Any, k: Any, v: Any, _: None, layer: Any) -> tuple[jax.Array, None]:
      if way != "padding":
        return kind.at_layer(layer).attend(q, k, v, metadata), None
      both = [of.attend(q, k, v, own) for of, own in zip(kind.kinds, metadata, strict=True)]
      is_full_N = jnp.asarray(kind.budgets.assignment)[layer] == 0
      is_full_H = jnp.repeat(is_full_N, HEADS // KV_HEADS)
      return jnp.where(is_full_H[None, None, :, None], *both), None

    if way == "switch" and config.remat == "none":
      attend = jax.checkpoint(attend, prevent_cse=False)
    if way == "unrolled":
      layers = nnx.merge(structure, params)
      return run_unstacked(layers, x_BxLxE, rope, attend, None, kind.layer_index)[0]
    start = 0
    lengths = [LAYERS]
    if way == "runs":
      lengths = [len(list(run)) for _, run in itertools.groupby(kind.budgets.assignment)]
    for count in lengths:
      part = jax.tree.map(lambda x, a=start, b=start + count: x[a:b], params)
      place = kind.layer_index(start)

      def attend_run(*qkv: Any, place: Any = place) -> tuple[jax.Array, None]:
        return attend(*qkv[:-1], place if way == "runs" else qkv[-1])

      x_BxLxE, _ = run_stacked(
        nnx.merge(structure, part),
        x_BxLxE,
        rope,
        attend_run,
        None,
        num_layers=count,
        remat=config.remat,
      )
      start += count
    return x_BxLxE

  return params, run


def main(argv: Sequence[str]) -> None:
  """Prints one row of the table."""
  del argv
  way = _WAY.value
  config = ModelConfig(
    vocab_size=8,
    num_layers=LAYERS,
    embed_dim=576,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=64,
    mlp_dim=1536,
    attention="head_budgets",
    head_budgets=HeadBudgets(("full", WINDOW), assignment(way)),
    remat=_REMAT.value,
  )
  params, run = layer_stack(config, way)
  x = jax.ShapeDtypeStruct((1, _LENGTH.value, config.embed_dim), config.dtype)
  gradient = jax.jit(jax.grad(lambda params, x: run(params, x).astype(jnp.float32).sum()))
  jax.jit(lambda: jnp.zeros(3)).lower().compile()  # starts the compiler
  begin = time.process_time()
  lowered = gradient.lower(params, x)
  middle = time.process_time()
  compiled = lowered.compile()
  end = time.process_time()
  memory = compiled.memory_analysis()
  print(environment())
  print(
    "| way | remat | distinct layers | trace and lower, CPU s | compile, CPU s "
    "| lines of StableHLO | temporary MiB |"
  )
  print(
    f"| {way} | {config.remat} | {len(set(assignment(way)))} | {middle - begin:.1f} | "
    f"{end - middle:.1f} | {lowered.as_text().count(chr(10))} | "
    f"{memory.temp_size_in_bytes / 2**20:.0f} |"
  )


if __name__ == "__main__":
  app.run(main)
