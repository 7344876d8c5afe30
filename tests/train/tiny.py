"""A tiny training run: random words, byte tokens, a dense decoder of a few thousand parameters."""

import dataclasses
import random
from pathlib import Path

from dga_jax.model import ModelConfig
from train.config import to_dict, TrainConfig
from train.data.config import DataConfig

WORDS = ("the", "key", "of", "each", "block", "opens", "one", "more", "door", "and", "a", "lock")


def write_corpus(folder: Path) -> None:
  """Writes train-*.txt and held-out.txt, a few KB of random words."""
  rng = random.Random(0)
  for name in ("train-0", "train-1", "train-2", "held-out"):
    text = " ".join(rng.choice(WORDS) for _ in range(800))
    (folder / f"{name}.txt").write_text(text)


def tiny_config(corpus: Path, cache: Path) -> TrainConfig:
  """A run of 12 steps with 4 sequences of 32 bytes, evaluated every 6 and saved every 3 steps."""
  return TrainConfig(
    model=ModelConfig(
      vocab_size=257,
      num_layers=2,
      embed_dim=16,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      mlp_dim=32,
      attention="dense",
      dtype="float32",
    ),
    data=DataConfig(
      sequence_length=32,
      train_files=(str(corpus / "train-*.txt"),),
      validation_files=(str(corpus / "held-out.txt"),),
      tokenizer="byte",
      cache_dir=str(cache),
    ),
    num_steps=12,
    batch_size=4,
    grad_accumulation=2,
    learning_rate=1e-2,
    warmup_steps=2,
    loss_chunk=16,
    log_every=3,
    eval_every=6,
    eval_batches=2,
    checkpoint_every=3,
  )


def interruptible(config: TrainConfig, *, num_steps: int, checkpoint_every: int) -> TrainConfig:
  """A config that compiles fast and saves many checkpoints, for runs that tests interrupt."""
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, num_layers=1),
    mesh=dataclasses.replace(config.mesh, data=1),
    num_steps=num_steps,
    grad_accumulation=1,
    eval_batches=0,
    checkpoint_every=checkpoint_every,
  )


def write_config(config: TrainConfig, path: Path) -> Path:
  """Writes the config to a file for --config."""
  path.write_text(
    "import ml_collections\n\n\n"
    "def get_config():\n"
    f"  return ml_collections.ConfigDict({to_dict(config)!r})\n"
  )
  return path
