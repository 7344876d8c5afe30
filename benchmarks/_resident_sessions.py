"""How many sessions fit into a number of bytes, from the shapes of their caches."""

import dataclasses
from typing import NamedTuple

from flax import nnx

from benchmarks._decoder_inputs import SMOLLM2_135M
from benchmarks._serve_models import llama2_7b
from dga_jax import DGAConfig, HeadBudgets
from dga_jax.checkpoint import abstract_decoder
from dga_jax.config import RETROFIT
from dga_jax.generation.cache_shapes import CacheShapes
from dga_jax.model import ModelConfig

_ROWS_OF_PROMPTS = 2  # Caches that the engine needs beside those of the slots.
# Blocks of 30 + 2 tokens without a raw window.
_SMALL_CACHE = DGAConfig(
  selection="streaming", group_size=30, focal_per_block=2, sink_tokens=4, local_window=0
)
_SMOLLM2 = ModelConfig(
  **SMOLLM2_135M,
  attention="dense",
  dga=RETROFIT,
  dtype="bfloat16",
)


class Resident(NamedTuple):
  """The sessions of a model in some memory.

  Attributes:
    model: name of the model.
    kind: name of the attention kind.
    length: tokens for which each session has room.
    session_bytes: bytes of all arrays that the engine allocates for one session.
    sessions: sessions whose caches fit into the memory.
    slots: slots with which the engine accepts the memory as its `cache_bytes`.
    times_dense: bytes of a dense session over those of this one.
    sessions_of_dense: sessions over those of dense attention in the same memory.
  """

  model: str
  kind: str
  length: int
  session_bytes: int
  sessions: int
  slots: int
  times_dense: float
  sessions_of_dense: float


def resident_sessions(
  model: str, kinds: dict[str, ModelConfig], length: int, memory: int
) -> list[Resident]:
  """The sessions of one model with several attention kinds.

  Args:
    model: name of the model.
    kinds: configs by name; "dense" must be one of them.
    length: tokens for which each session has room.
    memory: bytes.
  """
  row = {kind: session_bytes(config, length) for kind, config in kinds.items()}
  return [
    Resident(
      model, kind, length, own, memory // own, max(0, memory // own - _ROWS_OF_PROMPTS),
      row["dense"] / own, (memory // own) / (memory // row["dense"]),
    )
    for kind, own in row.items()
  ]  # fmt: skip


def session_bytes(config: ModelConfig, length: int) -> int:
  """Bytes of all arrays that the engine allocates for the cache of one sequence."""
  return CacheShapes(nnx.merge(*abstract_decoder(config)), length).row_bytes


def known_models() -> dict[str, dict[str, ModelConfig]]:
  """LLaMA2-7B's and SmolLM2's shapes in bfloat16, each with dense attention, DGA and budgets.

  The budgets show the bytes of a mixture. They are not calibrated.
  """
  models = {"LLaMA2-7B": llama2_7b("dense"), "SmolLM2-135M": _SMOLLM2}
  return {name: _kinds(config) for name, config in models.items()}


def _kinds(config: ModelConfig) -> dict[str, ModelConfig]:
  return {
    "dense": dataclasses.replace(config, attention="dense"),
    "DGA": dataclasses.replace(config, attention="dga"),
    "DGA, compact entries in 8 bits": dataclasses.replace(
      config, attention="dga", dga=dataclasses.replace(config.dga, cache_dtype="int8")
    ),
    "1 % of KV heads full, others 30 + 2 without window": _with_full_heads(config, 0.01),
  }


def _with_full_heads(config: ModelConfig, share: float) -> ModelConfig:
  """Budgets in which a share of the KV heads, at least one, keeps every token."""
  layers, heads = config.num_layers, config.num_kv_heads
  count = max(1, round(share * layers * heads))
  flat = [0 if i < count else 1 for i in range(layers * heads)]
  # Consecutive full heads are in different layers.
  assignment = tuple(tuple(flat[head * layers + layer] for head in range(heads))
                     for layer in range(layers))  # fmt: skip
  budgets = HeadBudgets(("full", _SMALL_CACHE), assignment)
  return dataclasses.replace(config, attention="head_budgets", head_budgets=budgets)
