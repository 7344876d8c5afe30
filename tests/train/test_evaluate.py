"""The evaluation on held-out data equals a direct computation."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dga_jax.tokenizer import Tokenizer
from train.config import TrainConfig
from train.evaluate import bucket_starts, evaluate, make_eval_step, token_lengths
from train.step import make_functions


def make_batch(config: TrainConfig, seed: int) -> dict[str, np.ndarray]:
  """Two documents per row, the second from position 20, then four positions of padding."""
  B, L = config.batch_size, config.data.sequence_length
  rng = np.random.default_rng(seed)
  segments_BxL = np.tile(np.where(np.arange(L) < 20, 1, 2), (B, 1)).astype(np.int32)
  segments_BxL[:, -4:] = -1
  return {
    "inputs": rng.integers(0, 257, (B, L), dtype=np.int32),
    "targets": rng.integers(0, 257, (B, L), dtype=np.int32),
    "segment_ids": segments_BxL,
    "loss_mask": (segments_BxL > 0) & (rng.random((B, L)) < 0.7),
  }


def test_evaluation_equals_directly_computed_means(config: TrainConfig) -> None:
  functions = make_functions(config)
  params = functions.init().params
  tokenizer = Tokenizer.byte_level()
  batches = [make_batch(config, seed) for seed in range(3)]
  eval_step = make_eval_step(config, functions, tokenizer)
  result = evaluate(config, functions, eval_step, params, batches)

  model = nnx.merge(functions.graphdef, params)
  losses, positions, correct, num_bytes = [], [], 0, 0
  for batch in batches[: config.eval_batches]:
    mask = batch["loss_mask"]
    logits = model(batch["inputs"], segment_ids=batch["segment_ids"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    losses.append(np.asarray(loss)[mask])
    positions.append(
      np.where(np.arange(32) < 20, np.arange(32), np.arange(32) - 20)[mask.nonzero()[1]]
    )
    correct += (np.argmax(logits, -1) == batch["targets"])[mask].sum()
    num_bytes += (batch["targets"][mask] != tokenizer.end_id).sum()
  loss, position = np.concatenate(losses), np.concatenate(positions)

  assert result.loss == pytest.approx(loss.mean(), rel=1e-5)
  assert result.accuracy == pytest.approx(correct / len(loss))
  assert result.bits_per_byte == pytest.approx(loss.sum() / math.log(2) / num_bytes, rel=1e-5)
  assert result.loss_by_position == pytest.approx(
    {0: loss[position < 16].mean(), 16: loss[position >= 16].mean()}, rel=1e-5
  )


def test_position_buckets_without_tokens_are_omitted(config: TrainConfig) -> None:
  functions = make_functions(config)
  batch = make_batch(config, 0)
  batch["loss_mask"][:, 16:20] = False
  config = dataclasses.replace(config, eval_batches=1)
  eval_step = make_eval_step(config, functions, Tokenizer.byte_level())
  result = evaluate(config, functions, eval_step, functions.init().params, [batch])
  assert list(result.loss_by_position) == [0]


@pytest.mark.parametrize(
  ("length", "starts"), [(2, [0]), (16, [0]), (17, [0, 16]), (128, [0, 16, 32, 64])]
)
def test_position_buckets_double_in_size(length: int, starts: list[int]) -> None:
  assert bucket_starts(length).tolist() == starts


def test_token_lengths() -> None:
  lengths_V = token_lengths(Tokenizer.train_bpe(["ab ab ab ab"] * 9, 259), 300)
  assert lengths_V.shape == (300,)
  assert sorted(set(lengths_V.tolist())) == [0, 1, 2, 3]
  assert (lengths_V == 0).sum() == 1 + 300 - 259


def test_a_jitted_step_is_compiled_once(config: TrainConfig) -> None:
  functions = make_functions(config)
  eval_step = make_eval_step(config, functions, Tokenizer.byte_level())
  params = functions.init().params
  with jax.log_compiles(False):
    for seed in range(3):
      eval_step(params, make_batch(config, seed))
  assert eval_step._cache_size() == 1
