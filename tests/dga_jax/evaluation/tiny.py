"""A small byte-level model with random weights, its checkpoint, and documents for tests."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from dga_jax.checkpoint import Checkpoints
from dga_jax.choices import DtypeName
from dga_jax.config import DGAConfig
from dga_jax.evaluation.variants import Family
from dga_jax.model import ModelConfig
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.model.random_decoder import random_decoder

CONFIG = ModelConfig(
  vocab_size=257,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  attention="dga",
  dga=DGAConfig(selection="streaming", group_size=3, sink_tokens=2, local_window=1),
  dtype="float32",
)
TOKENIZER = Tokenizer.byte_level()
STORY = (
  "The carrier stopped at the gate. Nobody came out! He called twice and waited. Rain began to"
  " fall on the empty road. Was there no one at home? He left the parcel under the porch. "
)


def family(**changes: object) -> Family:
  model = random_decoder(dataclasses.replace(CONFIG, **changes))
  return Family(model, TOKENIZER.start_ids)


def write_checkpoint(workdir: Path, *, dtype: DtypeName = "float32", scale: float = 1.0) -> Path:
  """Saves a checkpoint of the model with its weights multiplied by `scale`; returns the workdir."""
  config = dataclasses.replace(CONFIG, dtype=dtype)
  params = nnx.to_pure_dict(nnx.state(random_decoder(config), nnx.Param))
  params = jax.tree.map(lambda weight: weight * scale, params)
  with Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      params=params,
      training={"step": jnp.int32(0)},
      data=None,
      config={"model": config.to_dict()},
      tokenizer=TOKENIZER,
    )
  return workdir


def write_documents(folder: Path) -> Path:
  path = folder / "documents.jsonl"
  lines = [json.dumps({"id": f"story {i}", "text": f"{i} " + STORY * 4}) for i in range(2)]
  path.write_text("\n".join(lines))
  return path
