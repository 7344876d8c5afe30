"""A decoder of three layers, candidates and rows, small enough to measure every head."""

import numpy as np

from dga_jax.calibration.measuring import RowSet
from dga_jax.calibration.rows import Rows
from dga_jax.config import DGAConfig
from dga_jax.evaluation.texts import Document
from dga_jax.head_budgets import FULL
from dga_jax.model import Decoder, ModelConfig
from tests.dga_jax.evaluation import tiny
from tests.dga_jax.model.random_decoder import random_decoder

LENGTH = 192
CONFIG = ModelConfig(
  vocab_size=257,
  num_layers=3,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  attention="dense",
  dtype="float32",
  focal_selector=True,
)
STREAMING = DGAConfig(
  selection="streaming", group_size=5, focal_per_block=1, sink_tokens=2, local_window=1
)
SHORT = DGAConfig(
  selection="streaming", selector="fitted", group_size=7, focal_per_block=1, sink_tokens=2
)
CANDIDATES = (FULL, STREAMING, SHORT)
SHAPE = (CONFIG.num_layers, CONFIG.num_kv_heads)
DOCUMENTS = [Document(f"story {i}", f"{i} " + tiny.STORY * 4) for i in range(3)]


def decoder() -> Decoder:
  return random_decoder(CONFIG)


def rows(samples: int = 2) -> RowSet:
  return RowSet(
    text=Rows.from_texts(DOCUMENTS, tiny.TOKENIZER, LENGTH, 1),
    retrieval=Rows.from_puzzles(
      DOCUMENTS, tiny.TOKENIZER, LENGTH, puzzles=["passkey"], samples=samples, seed=3
    ),
  )


def tokens(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 257, (2, LENGTH + 1)).astype(np.int32)
