"""Dynamic Group Attention and dense attention, both in XLA without kernels.

  ./workspace bench attention_xla

Settings: batch 1, 8 heads, D = 64, float32, γ = 0.1, m = 16, min_focal_tokens = 0. All programs of
a length run in one process in alternating rounds on new random inputs. The output shows the median
and the range of the rounds. The speed-up is over the faster of two dense programs: all heads at
once, and one head after another. At 16K the first one needs more than 24 GB for its backward pass.
The size of temporary arrays is from the memory analysis of the compiled program.

Matrix-product FLOPs of the forward pass: dense 4·H·D·L², which includes the masked half; DGA
4·H·D·L·(r + k + 256 + m), where 256 is the size of a query block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from absl import app, flags

from benchmarks.timing import alternate, environment
from dga_jax import DGAConfig, dynamic_group_attention

_LENGTHS = flags.DEFINE_list("lengths", ["2048", "4096", "8192", "16384"], "Sequence lengths.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds.", lower_bound=1)

H, D = 8, 64


def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Dense causal attention in XLA, the baseline."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def dense_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Dense causal attention in XLA, one head at a time, with 1/8 of the temporary memory."""
  heads = jax.lax.map(
    lambda qkv: dense(*(x[:, :, None] for x in qkv))[:, :, 0],
    tuple(x.transpose(2, 0, 1, 3) for x in (q, k, v)),
  )
  return heads.transpose(1, 2, 0, 3)


def dga(selection: Any) -> Callable[..., jax.Array]:
  """Dynamic Group Attention with the paper's settings and min_focal_tokens = 0."""
  config = DGAConfig(selection=selection, min_focal_tokens=0)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return dynamic_group_attention(q, k, v, config=config, implementation="xla")

  return attend


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
  """A function of (q, k, v, cotangent) that returns the output and the gradients of q, k and v."""

  def run(q: jax.Array, k: jax.Array, v: jax.Array, t: jax.Array) -> Any:
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(t)

  return run


def compile_all(length: int, backward: bool) -> dict[str, Any]:
  """Compiles every attention function for one length, by name."""
  x = jax.ShapeDtypeStruct((1, length, H, D), jnp.float32)
  functions = {
    "dense": dense,
    "dense by head": dense_by_head,
    "streaming": dga("streaming"),
    "global": dga("global"),
  }
  return {
    name: jax.jit(with_gradients(attend)).lower(x, x, x, x).compile()
    if backward
    else jax.jit(lambda q, k, v, t, attend=attend: attend(q, k, v)).lower(x, x, x, x).compile()
    for name, attend in functions.items()
  }


def main(argv: Sequence[str]) -> None:
  """Prints one line for each length, direction and program."""
  del argv
  print(
    f"{environment()}; B=1 H={H} D={D} float32, γ=0.1 m=16 min_focal_tokens=0;"
    " median (minimum–maximum)"
  )
  for backward in (False, True):
    direction = "forward + backward" if backward else "forward"
    for length in map(int, _LENGTHS.value):
      programs = compile_all(length, backward)
      temporaries = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
      }
      room = psutil.virtual_memory().available
      for name in [name for name, size in temporaries.items() if size > 0.9 * room]:
        print(
          f"{length}: {name} is skipped: its temporary arrays need {temporaries[name] / 1e9:.1f} GB"
        )
        del programs[name]

      def inputs(key: jax.Array, length: int = length) -> tuple[jax.Array, ...]:
        return tuple(
          jax.random.normal(k, (1, length, H, D), jnp.float32) for k in jax.random.split(key, 4)
        )

      times = alternate(programs, inputs, repeats=_REPEATS.value, label=f"{direction} {length}")
      dense_seconds = min(taken.median for name, taken in times.items() if "dense" in name)
      for name, taken in times.items():
        print(
          f"{direction:18} {length:6} {name:13} {taken!s:32}"
          f" {dense_seconds / taken.median:5.2f} times the faster dense"
          f"  temporaries {temporaries[name] / 1e6:.0f} MB",
          flush=True,
        )


if __name__ == "__main__":
  app.run(main)
