"""A tiny random model with a chat template, and its checkpoint."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import tokenizers
from flax import nnx

from dga_jax.chat.template import ChatTemplate
from dga_jax.checkpoint import Checkpoints
from dga_jax.model import Decoder, ModelConfig
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.evaluation import tiny
from tests.dga_jax.model.random_decoder import random_decoder

START, STOP = "<|start|>", "<|stop|>"
TURNS = """\
{% for m in messages %}
{{ '<|start|>' + m.role + '\\n' + m.content | trim + '<|stop|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start|>assistant\\n' }}
{%- endif %}
"""
CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=259)
ORIGIN = {"model_type": "llama", "tokenizer_config": {"chat_template": TURNS}}


def tokenizer(template: str | None = TURNS) -> Tokenizer:
  backend = tokenizers.Tokenizer.from_str(Tokenizer.byte_level().to_plain_json())
  backend.add_special_tokens([START, STOP])
  made = Tokenizer(backend, end_token=STOP, start_tokens=())
  made.chat_template = None if template is None else ChatTemplate(template, made)
  return made


def model(**changes: object) -> Decoder:
  return random_decoder(dataclasses.replace(CONFIG, **changes))


def write_checkpoint(
  workdir: Path,
  config: ModelConfig = CONFIG,
  origin: dict | None = ORIGIN,
  entries: dict | None = None,
) -> Path:
  """Saves a random model, with the entries of an import (`origin`) or more in its config."""
  params = nnx.to_pure_dict(nnx.state(random_decoder(config), nnx.Param))
  with Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      params=params,
      training={"step": jnp.int32(0)},
      data=None,
      config={
        "model": config.to_dict(),
        **({} if origin is None else {"origin": origin}),
        **(entries or {}),
      },
      tokenizer=tokenizer(),
    )
  return workdir
