"""Writes queries, keys and values of a pretrained model, which `benchmarks.attention` can time.

    dga smollm2                        # or any other checkpoint
    ./workspace bench model_inputs --workdir=runs/smollm2 --document=a.txt --out=in.npz
    ./workspace bench attention --inputs=in.npz --selection=global

The model reads the first --length tokens of a text with dense attention. The file holds the arrays
`query` [L, H, D], `key` and `value` [L, N, D] in float16, after RoPE, with the heads of --layers
side by side: 4 layers of SmolLM2-135M give 36 query and 12 KV heads.
"""

from collections.abc import Sequence

import numpy as np
from absl import app, flags

from benchmarks._model_inputs import attention_inputs
from dga_jax.checkpoint import load_model
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.files.path_flags import define_path

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


if __name__ == "__main__":
  app.run(main)
