"""Quality and bytes of caches in 8 bits: the loss of decoding, relative to the dtype of the model.

  ./workspace bench cache_quality --workdir=runs/smollm2 --documents=novels.jsonl --prompt=1024

The heads follow --budgets, or the attention of the model. Every document gives one row of --prompt
tokens, which prefill reads, and --new_tokens tokens, which are decoded one by one as they are in
the document. The loss is the mean of their negative log likelihoods in nats. Agreement is the share
of these tokens at which the most likely token is the one with the cache in the dtype of the model.
MB are the bytes of the keys and values, with scales, of the cache of one sequence of --cache_length
tokens.
"""

from typing import Any, cast, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.timing import environment
from dga_jax import command_line
from dga_jax.choices import AttentionName, CacheDtypeName, DtypeName
from dga_jax.evaluation.texts import read_documents
from dga_jax.files.path_flags import define_path, define_paths
from dga_jax.generation.cache_shapes import CacheShapes, content_bytes
from dga_jax.loading import load
from dga_jax.model import Decoder

_WORKDIR = define_path("workdir", None, "folder of the model", required=True)
_DOCUMENTS = define_paths("documents", "files with id and text, .jsonl, or .txt")
_BUDGETS = command_line.define_budgets()
_ATTENTION = flags.DEFINE_string("attention", None, "attention kind; default: the model's")
_DTYPE = flags.DEFINE_string("dtype", None, "dtype of the activations; default: the model's")
_PROMPT = flags.DEFINE_integer("prompt", 1024, "tokens that prefill reads", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 256, "tokens that are decoded", lower_bound=1)
_CACHE_LENGTH = flags.DEFINE_integer("cache_length", 8192, "tokens of a cache", lower_bound=1)
_CACHE_DTYPES = flags.DEFINE_list(
  "cache_dtypes", ["int8", "float8_e4m3fn"], "dtypes to compare with that of the model"
)


class _Decoded(NamedTuple):
  """Losses and most likely tokens [B, T] of all decoded tokens, and the bytes of a cache."""

  losses: np.ndarray
  likely: np.ndarray
  size: int


def main(argv: list[str]) -> None:
  """Prints one line for each dtype of the cache."""
  del argv
  print(environment())
  print(f"prompts of {_PROMPT.value} tokens, then {_NEW_TOKENS.value} decoded tokens")
  print(f"| cache | MB at {_CACHE_LENGTH.value} tokens | loss | change | agreement |")
  print("| --- | --- | --- | --- | --- |")
  plain: _Decoded | None = None
  for name in (None, *_CACHE_DTYPES.value):
    own = _measure(cast(CacheDtypeName | None, name))
    plain = plain or own
    loss, reference = (one.losses.mean() for one in (own, plain))
    agreement = np.mean(own.likely == plain.likely)
    print(
      f"| {name or 'dtype of the model'} | {own.size / 1e6:.2f} | {loss:.4f} |"
      f" {loss - reference:+.4f} | {agreement:.2%} |",
      flush=True,
    )


def _measure(cache_dtype: CacheDtypeName | None) -> _Decoded:
  model, tokenizer = load(
    str(_WORKDIR.value),
    attention=cast(AttentionName | None, _ATTENTION.value),
    dtype=cast(DtypeName | None, _DTYPE.value),
    budgets=command_line.read_budgets(_BUDGETS),
    cache_dtype=cache_dtype,
  )
  length, rows = _PROMPT.value + _NEW_TOKENS.value, []
  for document in read_documents(_DOCUMENTS.value):
    tokens = [*tokenizer.start_ids, *tokenizer.encode(document.text)][:length]
    if len(tokens) < length:
      raise ValueError(
        f"{document.id} has {len(tokens)} tokens; --prompt and --new_tokens need {length}."
      )
    rows.append(tokens)
  graphdef, params = nnx.split(model.unstack_layers())
  read = jax.jit(lambda params, tokens: _decode(nnx.merge(graphdef, params), tokens))
  losses, likely = read(params, jnp.array(rows, jnp.int32))
  size = content_bytes(CacheShapes(model, _CACHE_LENGTH.value).rows(1))
  return _Decoded(np.asarray(losses), np.asarray(likely), size)


def _decode(
  model: Decoder, tokens_BxL: Int[Array, "B L"]
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
  """The losses of the tokens after the prompt, and the most likely tokens in their place."""
  prompt = _PROMPT.value

  def step(carry: Any, token_B: Array) -> tuple[Any, tuple[Array, Array]]:
    logits_BxV, cache = carry
    log_p_BxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32))
    loss_B = -jnp.take_along_axis(log_p_BxV, token_B[:, None], axis=1)[:, 0]
    return model.decode(token_B, cache), (loss_B, logits_BxV.argmax(axis=1))

  start = model.prefill(tokens_BxL[:, :prompt], max_length=tokens_BxL.shape[1])
  _, (losses_TxB, likely_TxB) = jax.lax.scan(step, start, tokens_BxL[:, prompt:].T)
  return losses_TxB.T, likely_TxB.T


if __name__ == "__main__":
  app.run(main)
