"""A tiny model, its checkpoints, and functions that damage their files."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dga_jax.checkpoint import Checkpoints
from dga_jax.model import Decoder, ModelConfig
from dga_jax.tokenizer import Tokenizer

CONFIG = ModelConfig(
  vocab_size=257,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=16,
  attention="dense",
  dtype="float32",
)


def make_params() -> dict[str, Any]:
  """Random parameters of the model `CONFIG`."""
  return nnx.to_pure_dict(nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(1)), nnx.Param))


def save(checkpoints: Checkpoints, step: int, params: Any, loss: float | None = None) -> None:
  checkpoints.save(
    step,
    params=params,
    training={"step": jnp.int32(step), "moment": jax.tree.map(lambda x: x * step, params)},
    data={"next_index": step},
    config={"model": CONFIG.to_dict()},
    tokenizer=Tokenizer.byte_level(),
    eval_loss=loss,
  )


def save_two(workdir: Path, params: Any) -> Path:
  """Saves checkpoints of the steps 2 and 4; returns the workdir."""
  with Checkpoints(workdir, keep=2) as checkpoints:
    save(checkpoints, 2, params)
    save(checkpoints, 4, params)
  return workdir


def largest_file(folder: Path) -> Path:
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def append(path: Path) -> None:
  path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def delete_item(path: Path) -> None:
  shutil.rmtree(path.parent)
