"""Writes queries, keys and values of a pretrained model, which `benchmarks.attention` can time.

    dga smollm2                        # or any other checkpoint
    ./workspace bench model_inputs --workdir=runs/smollm2 --document=a.txt --out=in.npz
    ./workspace bench attention --inputs=in.npz --selection=global

The model reads the first --length tokens of a text with dense attention. The file holds the arrays
`query` [L, H, D], `key` and `value` [L, N, D] in float16, after RoPE, with the heads of --layers
side by side: 4 layers of SmolLM2-135M give 36 query and 12 KV heads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax import Array
from jaxtyping import Int

from benchmarks._forward import chunked_causal_attention, embed, run_layers
from dga_jax.checkpoint import load_model
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.files.path_flags import define_path
from dga_jax.model import Decoder

_WORKDIR = define_path("workdir", None, "Checkpoint of the model.", required=True)
_DOCUMENT = define_path("document", None, "The text: .jsonl or .txt.", required=True)
_OUT = define_path("out", None, "The .npz file to write.", required=True)
_LENGTH = flags.DEFINE_integer("length", 8192, "Tokens.", lower_bound=1)
_LAYERS = flags.DEFINE_list("layers", ["4", "12", "20", "28"], "Layers whose heads are taken.")


def main(argv: Sequence[str]) -> None:
  """Writes the file and prints its shapes."""
  del argv
  model, _, tokenizer = load_model(_WORKDIR.value)
  rows = token_rows(read_documents([_DOCUMENT.value])[:1], tokenizer, _LENGTH.value)
  arrays = attention_inputs(model, rows[0, : _LENGTH.value], [int(x) for x in _LAYERS.value])
  np.savez(_OUT.value, query=arrays["query"], key=arrays["key"], value=arrays["value"])
  print({name: array.shape for name, array in arrays.items()})


def attention_inputs(
  model: Decoder, tokens_L: Int[np.ndarray, "L"], layers: Sequence[int]
) -> dict[str, np.ndarray]:
  """Query [L, H, D], key and value [L, N, D] in float16, the heads of the layers side by side."""
  graphdef, params = nnx.split(model)

  def attend(
    q: Array, k: Array, v: Array, caches: object, layer: Array
  ) -> tuple[Array, tuple[Array, Array, Array]]:
    del caches, layer
    return chunked_causal_attention(q, k, v), (q[0], k[0], v[0])

  @jax.jit
  def run(params: nnx.State) -> tuple[Array, ...]:
    decoder = nnx.merge(graphdef, params)
    _, by_layer = run_layers(decoder, embed(decoder, jnp.asarray(tokens_L)[None]), attend)
    # [layers, L, heads, D] -> [L, heads of all layers, D]
    chosen = jax.tree.map(lambda x: jnp.concatenate([x[i] for i in layers], axis=1), by_layer)
    return tuple(x.astype(jnp.float16) for x in chosen)

  return dict(zip(("query", "key", "value"), map(np.asarray, run(params)), strict=True))


if __name__ == "__main__":
  app.run(main)
