"""Compile time and memory of a train step whose layers have different numbers of full heads.

  ./workspace bench layer_scan --way=switch --remat=full

The program is the gradient of 30 layers with SmolLM2-135M's shapes (9 query heads, 3 KV heads) on
one sequence. 15 of the 90 KV heads, chosen at random, use full attention. The others use DGA with
blocks of 30 + 2, 4 sinks and 4 raw blocks. The program is traced, lowered and compiled for this
device, but not run. Times are CPU seconds of all threads of this process, so that they do not
depend on the load of the machine.
"""

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
from dga_jax.model.layers import DecoderLayer
from dga_jax.model.rope import rope_table
from dga_jax.model.run_layers import run_stacked

_WAYS = ("dga", "dense", "switch", "stored_switch", "padding")
_WAY = flags.DEFINE_enum(
  "way",
  "switch",
  _WAYS,
  "dga, dense: all heads alike; switch: as the decoder does; stored_switch: without its "
  "recomputation of attention; padding: every layer computes every head both ways.",
)
_REMAT = flags.DEFINE_enum("remat", "none", ["none", "full"], "value of ModelConfig.remat")
_LENGTH = flags.DEFINE_integer("length", 1024, "sequence length", lower_bound=1)

LAYERS, HEADS, KV_HEADS = 30, 9, 3
WINDOW = DGAConfig(
  selection="streaming", group_size=30, focal_per_block=2, sink_tokens=4, local_window=4
)


def assignment(way: str) -> tuple[tuple[int, ...], ...]:
  """For each layer and KV head, 0 for full attention and 1 for DGA, sorted within a layer."""
  if way in ("dga", "dense"):
    return ((int(way == "dga"),) * KV_HEADS,) * LAYERS
  other = np.ones(LAYERS * KV_HEADS, int)
  other[np.random.default_rng(0).permutation(other.size)[:15]] = 0
  return tuple(tuple(sorted(row)) for row in other.reshape(LAYERS, KV_HEADS).tolist())


def layer_stack(config: ModelConfig, way: str) -> tuple[Any, Callable[..., jax.Array]]:
  """The abstract parameters of the layers, and a function of them and of the residual stream."""
  model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
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
      full, window = (of.attend(q, k, v, own) for of, own in zip(kind.kinds, metadata, strict=True))
      is_full_N = jnp.asarray(kind.budgets.assignment)[layer] == 0
      is_full_H = jnp.repeat(is_full_N, HEADS // KV_HEADS)
      return jnp.where(is_full_H[None, None, :, None], full, window), None

    if way == "switch" and config.remat == "none":
      attend = jax.checkpoint(attend, prevent_cse=False)
    layers = nnx.merge(structure, params)
    assert isinstance(layers, DecoderLayer)  # They are stacked.
    return run_stacked(layers, x_BxLxE, rope, attend, None, num_layers=LAYERS, remat=config.remat)[
      0
    ]

  return params, run


def main(argv: Sequence[str]) -> None:
  """Prints one row of the table."""
  del argv
  way = _WAY.value
  remat: Any = _REMAT.value  # The flag has the names of the field.
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
    remat=remat,
  )
  params, run = layer_stack(config, way)
  x = jax.ShapeDtypeStruct((1, _LENGTH.value, config.embed_dim), config.dtype)
  gradient = jax.jit(jax.grad(lambda params, x: run(params, x).astype(jnp.float32).sum()))
  jax.jit(lambda: jnp.zeros(3)).lower().compile()  # Starts the compiler before the measurement.
  begin = time.process_time()
  lowered = gradient.lower(params, x)
  middle = time.process_time()
  compiled = lowered.compile()
  end = time.process_time()
  memory = compiled.memory_analysis()
  assert memory is not None  # The CPU's compiler has it.
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
