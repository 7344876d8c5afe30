"""What `dga serve` does before the port opens: allocates the slots, and prints a line a model."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from dga_jax.generation import Engine
from dga_jax.serving.launch import allocate, describe, LaunchSettings
from dga_jax.serving.served_model import ServedModel
from tests.dga_jax.chat import chatty


def line(*, trained_length: int | None, devices: int, with_template: bool) -> str:
  """The line of a model with two KV heads and slots of 512 tokens."""
  shapes = SimpleNamespace(row_bytes=2_000_000)
  engine: Any = SimpleNamespace(
    config=chatty.CONFIG, max_length=512, programs=SimpleNamespace(shapes=shapes)
  )
  mesh: Any = SimpleNamespace(shape={"tensor": devices})
  settings = LaunchSettings(
    slots=3, max_length=512, max_waiting=1, prompt_chunk=16, decode_chunk=1, cache_bytes=None,
    host_bytes=0, mesh=mesh,
  )  # fmt: skip
  tokenizer = chatty.tokenizer()
  template = tokenizer.chat_template if with_template else None
  model = ServedModel("tiny", engine, tokenizer, template, 0, trained_length)
  return describe(model, settings)


def test_a_model_without_surprises():
  want = "tiny: 3 slots of 512 tokens, 2.0 MB of cache each, dense would be 0.1 MB"
  for trained_length in (512, None):
    assert line(trained_length=trained_length, devices=2, with_template=True) == want


def test_what_a_user_may_not_expect_is_named():
  found = line(trained_length=256, devices=4, with_template=False).split("; ")[1:]
  assert found == [
    "without a chat template: /v1/completions only",
    "trained on at most 256 tokens, and may not use the rest well",
    "4 devices do not divide the KV heads: each has the whole cache",
  ]


def test_slots_are_allocated_before_the_first_request(engine_alone: Engine):
  engine_alone.reset()
  allocate(engine_alone)
  assert engine_alone._state is not None
  assert not engine_alone.busy
  assert engine_alone.status().kept == 0


def test_too_little_memory_names_the_settings(
  engine_alone: Engine, monkeypatch: pytest.MonkeyPatch
):
  def fail(*_: Any) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

  engine_alone.reset()
  monkeypatch.setattr(engine_alone.programs, "decode", fail)
  with pytest.raises(ValueError, match=r"slots is 1 and max_length is 512, .* 9 bytes\.$"):
    allocate(engine_alone)
