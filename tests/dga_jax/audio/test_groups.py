"""Groups of a model over a sound: numbers, shares and the plot."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dga_jax import DGAConfig
from dga_jax.audio.group_plot import FocalShares, plot_groups
from dga_jax.audio.layer_groups import FOCAL, groups_by_layer, RAW
from dga_jax.audio.tokens import samples_to_tokens
from dga_jax.model import Decoder
from tests.dga_jax.tiny_checkpoint import CONFIG

RATE = 1000
STREAMING = DGAConfig(selection="streaming", group_size=6, focal_per_block=2)
GLOBAL = DGAConfig(group_size=6, importance_rate=0.25, min_focal_tokens=0)


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
  """A tone, then near silence."""
  time_T = np.arange(90) / RATE
  return (0.5 * np.sin(2 * np.pi * 90 * time_T) * (time_T < 0.045) + 1e-3).astype(np.float32)


@pytest.fixture(scope="module")
def groups(samples: np.ndarray) -> dict[str, np.ndarray]:
  config = dataclasses.replace(CONFIG, vocab_size=257)
  model = Decoder(config, rngs=nnx.Rngs(0))
  tokens = samples_to_tokens(samples)
  return {
    name: groups_by_layer(model, tokens, each)
    for name, each in (("streaming", STREAMING), ("global", GLOBAL))
  }


def test_streaming_groups_are_the_blocks(groups: dict[str, np.ndarray]) -> None:
  numbers_YxNxT = groups["streaming"]
  assert numbers_YxNxT.shape == (CONFIG.num_layers, CONFIG.num_kv_heads, 90)
  # 90 samples are 11 blocks of 8 and 2 raw samples.
  assert (numbers_YxNxT[..., 88:] == RAW).all()
  blocks_YxNxKxS = numbers_YxNxT[..., :88].reshape(*numbers_YxNxT.shape[:2], 11, 8)
  assert ((blocks_YxNxKxS == FOCAL).sum(axis=-1) == 2).all()
  numbers_K = np.arange(11)[None, None, :, None]
  assert ((blocks_YxNxKxS == FOCAL) | (blocks_YxNxKxS == numbers_K)).all()


def test_global_groups_are_runs_of_the_other_samples(groups: dict[str, np.ndarray]) -> None:
  for numbers_T in groups["global"].reshape(-1, 90):
    members_M = numbers_T[numbers_T != FOCAL]
    # 23 focal samples, and the remainder of 67 after groups of 6.
    assert len(members_M) == 66
    np.testing.assert_array_equal(members_M, np.repeat(np.arange(11), 6))


def test_layers_differ(groups: dict[str, np.ndarray]) -> None:
  first, second = groups["global"][:2]
  assert (first != second).any()


def test_shares_of_pauses_and_sound(samples: np.ndarray) -> None:
  numbers_YxNxT = np.zeros((1, 1, 90), np.int32)
  numbers_YxNxT[..., :20] = FOCAL
  shares = FocalShares.of_groups(samples, numbers_YxNxT, RATE)
  # Bins of 10 samples: five with sound, of which two are focal, and four pauses.
  assert shares == FocalShares(
    pauses=0.0, sound=pytest.approx(2 / 5), pauses_of_sound=pytest.approx(4 / 9)
  )


def test_plot(samples: np.ndarray, groups: dict[str, np.ndarray], tmp_path: Path) -> None:
  path = tmp_path / "groups.png"
  plot_groups(path, samples, groups, RATE, title="sound", head=(1, 0), zoom=(0.01, 0.05))
  with Image.open(path) as image:
    assert min(image.size) > 400


def test_layers_attend_with_the_kind_of_the_model(samples: np.ndarray) -> None:
  """The groups of the last layer depend on the attention of the layers before it."""
  tokens = samples_to_tokens(samples)
  dense = dataclasses.replace(CONFIG, vocab_size=257, attention="dense")
  sliding = dataclasses.replace(
    dense,
    attention="sliding_window",
    sliding_window=dataclasses.replace(dense.sliding_window, window=2),
  )
  models = [Decoder(config, rngs=nnx.Rngs(0)) for config in (dense, sliding)]
  ours, theirs = (groups_by_layer(model, tokens, GLOBAL) for model in models)
  np.testing.assert_array_equal(ours[0], theirs[0])
  assert (ours[-1] != theirs[-1]).any()
  assert ours.dtype == jnp.int32
