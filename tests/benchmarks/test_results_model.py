"""A folder of results refuses results of other weights."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks._results_model import require_model
from dga_jax.model import ModelConfig
from tests.dga_jax.model.random_decoder import random_decoder

CONFIG = ModelConfig(
  vocab_size=8, num_layers=1, embed_dim=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=4
)


def test_a_folder_keeps_to_one_model(tmp_path: Path) -> None:
  model = random_decoder(CONFIG)
  require_model(tmp_path, model)
  require_model(tmp_path, random_decoder(CONFIG))  # The same weights.
  model.embedding[...] = model.embedding[...] + 1
  with pytest.raises(ValueError, match=r"model\.jsonl was measured with sha256=.*another --out"):
    require_model(tmp_path, model)
  longer = random_decoder(dataclasses.replace(CONFIG, rope_base=4e5))
  with pytest.raises(ValueError, match=r"rope_base=10000\.0, and this run has rope_base=400000\.0"):
    require_model(tmp_path, longer)
  require_model(tmp_path, longer, "longer.model")
