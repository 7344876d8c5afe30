"""Continues a sound with a model that was trained on sound."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from dga_jax.audio.tokens import audio_tokenizer, samples_to_tokens, tokens_to_samples
from dga_jax.generation.continuous_batching import ContinuousBatching, Generation, Request
from dga_jax.generation.sampling import Sampling
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Continuation:
  """A continued sound.

  Attributes:
    samples: [T] float32, the new samples, from −1 to 1.
    generation: times and cache sizes.
  """

  samples: Float[np.ndarray, "T"]
  generation: Generation


def continue_sound(
  model: Decoder,
  tokenizer: Tokenizer,
  prompt_T: Float[np.ndarray, "T"],
  num_samples: int,
  sampling: Sampling,
) -> Continuation:
  """Samples up to `num_samples` samples after a prompt; fewer if the model ends the sound.

  Args:
    model: trained on data of kind "audio".
    tokenizer: of the same checkpoint.
    prompt_T: samples from −1 to 1 at the sample rate of the model.
    num_samples: at least 1.
    sampling: how samples are drawn.

  Raises:
    ValueError: the model was not trained on sound, or the arguments are out of range.
    FloatingPointError: the logits are NaN or infinite.
  """
  if tokenizer.to_json() != audio_tokenizer().to_json():
    raise ValueError("The tokenizer is not one of sound: the model was trained on other data.")
  tokens = [*tokenizer.start_ids, *samples_to_tokens(prompt_T).tolist()]
  request = Request(tokens, num_samples, sampling)
  batch = ContinuousBatching(model, [request], slots=1, stop_ids=tokenizer.stop_ids)
  result = batch.run()
  result.raise_if_failed()
  return Continuation(tokens_to_samples(np.array(result.tokens[0], np.int32)), result)


def sample_rate_of(saved: Mapping[str, Any], workdir: str) -> int:
  """The sample rate of a checkpoint's training data, in Hz.

  Args:
    saved: the config of the checkpoint.
    workdir: its folder, for the message.

  Raises:
    ValueError: the model was not trained on sound.
  """
  data = saved.get("data") or {}
  if data.get("kind") != "audio":
    raise ValueError(
      f"The model in {workdir} was not trained on sound. Train one with config.data.kind=audio, "
      "for example with configs/audio.py."
    )
  return int(data["audio"]["sample_rate"])
