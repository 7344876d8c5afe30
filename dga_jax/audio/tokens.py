"""Tokens of sound: one token a sample, its μ-law level."""

import numpy as np
from jaxtyping import Float, Int32, Integer

from dga_jax.audio.mu_law import decode_mu_law, encode_mu_law, LEVELS
from dga_jax.tokenizer import Tokenizer

_FIRST = 1  # Id of level 0. Id 0 is the end token.


def audio_tokenizer() -> Tokenizer:
  """The tokenizer of an audio checkpoint: the end token, then the levels as words s0 to s255."""
  return Tokenizer.words([f"s{level}" for level in range(LEVELS)])


def samples_to_tokens(samples_T: Float[np.ndarray, "T"]) -> Int32[np.ndarray, "T"]:
  """The token ids of samples from −1 to 1."""
  return encode_mu_law(samples_T).astype(np.int32) + _FIRST


def tokens_to_samples(tokens_T: Integer[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
  """The samples of token ids.

  Raises:
    ValueError: an id is the end token or no token of sound.
  """
  return decode_mu_law(tokens_T - _FIRST)
