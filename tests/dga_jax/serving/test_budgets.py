"""`dga serve --budgets`: a model whose KV heads have settings of their own."""

import contextlib
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from flax import nnx

import dga_jax
from dga_jax import HeadBudgets
from dga_jax.config import RETROFIT
from dga_jax.generation import Sampling
from dga_jax.model import Decoder
from dga_jax.serving import launch
from tests.dga_jax.chat import chatty
from tests.dga_jax.evaluation.tiny import CONFIG
from tests.dga_jax.serving.tiny_server import NAME, serve

BUDGETS = HeadBudgets(("full", CONFIG.dga), ((1, 0), (1, 1)))
GREEDY = {"model": NAME, "max_tokens": 20, "temperature": 0}
PROMPT = "The carrier stopped at the gate. Nobody came out! He called twice and waited."


def test_answers_equal_those_of_generate(workdir: Path, tmp_path: Path):
  file = tmp_path / "budgets.json"
  file.write_text(BUDGETS.to_json())
  model, tokenizer = dga_jax.load(workdir, budgets=BUDGETS)
  assert model.config.attention == "head_budgets"
  messages = [{"role": "user", "content": PROMPT}]
  alone = [
    dga_jax.generate(
      model, tokenizer, prompt, max_new_tokens=20, sampling=Sampling(temperature=0.0)
    )
    for prompt in (PROMPT, messages)
  ]
  with serve(workdir, tmp_path / "log", f"--budgets={file}", "--prompt_chunk=32") as server:
    completion, again = (
      httpx.post(f"{server.url}/v1/completions", json=GREEDY | {"prompt": PROMPT}, timeout=60)
      for _ in range(2)
    )
    chat = httpx.post(
      f"{server.url}/v1/chat/completions", json=GREEDY | {"messages": messages}, timeout=60
    )
  assert completion.json()["choices"][0]["text"] == alone[0]
  assert chat.json()["choices"][0]["message"]["content"] == alone[1]
  usage = completion.json()["usage"]
  # One head of four keeps every token.
  assert usage["cache_bytes"]["dense"] / 4 < usage["cache_bytes"]["live"]
  assert usage["cache_bytes"]["live"] < usage["cache_bytes"]["dense"]
  assert again.json()["choices"] == completion.json()["choices"]
  assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) + 1


@pytest.mark.parametrize("order", [("dense", "dga"), ("dga", "dense")])
def test_kinds_with_other_budgets_have_weights_of_their_own(
  order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  # Budgets whose classes are not adjacent, so that the weights of "dga" are permuted.
  budgets = HeadBudgets(("full", RETROFIT), ((1, 0), (1, 0)))
  assert budgets.contiguous_order() != HeadBudgets(("full",), ((0, 0),) * 2).contiguous_order()
  monkeypatch.setattr(
    "dga_jax.loading.default_budgets",
    lambda config: budgets if config.attention == "dga" else None,
  )
  workdir = chatty.write_checkpoint(tmp_path / "run")
  made = load_without_engines(monkeypatch, workdir, attentions=order)
  assert [name for name, *_ in made] == [f"run-{attention}" for attention in order]
  check_weights(made)


def test_each_of_several_budgets_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  workdir = chatty.write_checkpoint(tmp_path / "run")
  budgets = {
    "25": HeadBudgets(("full", RETROFIT), ((1, 0), (1, 1))),
    "50": HeadBudgets(("full", RETROFIT), ((1, 0), (1, 0))),
  }
  made = load_without_engines(monkeypatch, workdir, attentions=[None], budgets=budgets)
  assert [name for name, *_ in made] == ["run-25", "run-50"]
  for (_, model, _), own in zip(made, budgets.values(), strict=True):
    assert model.config.head_budgets.counts() == own.counts()
  check_weights(made)
  ((name, model, _),) = load_without_engines(
    monkeypatch, workdir, attentions=[None], budgets={"25": budgets["25"]}, cache_dtype="int8"
  )
  assert name == "run"
  assert model.config.head_budgets.cache_dtype == "int8"
  with pytest.raises(ValueError, match="attention is 'dense' and budgets are given"):
    load_without_engines(monkeypatch, workdir, attentions=["dense"], budgets=budgets)


def test_a_kind_that_is_given_twice_is_refused(workdir: Path, monkeypatch: pytest.MonkeyPatch):
  with pytest.raises(ValueError, match=r"attention is \['dga', 'dga'\]; name each kind once"):
    load_without_engines(monkeypatch, workdir, attentions=["dga", "dga"])


def load_without_engines(
  monkeypatch: pytest.MonkeyPatch, workdir: Path, **options: Any
) -> list[tuple[str, Decoder, nnx.State]]:
  """The name, the model and the weights of each model of `load_models`."""
  made = []

  def make_engine(loaded, weights, settings, progress):
    del settings, progress
    made.append((loaded.model, weights))

  monkeypatch.setattr(launch, "_make_engine", make_engine)
  monkeypatch.setattr(launch, "allocate", lambda engine: None)
  settings = launch.LaunchSettings(
    slots=1, max_length=64, max_waiting=1, prompt_chunk=16, decode_chunk=1, cache_bytes=None,
    host_bytes=0, mesh=None,
  )  # fmt: skip
  models = launch.load_models(
    str(workdir), None, name=None, dtype=None, settings=settings, progress=contextlib.nullcontext,
    **options,
  )  # fmt: skip
  return [(one.name, *own) for one, own in zip(models, made, strict=True)]


def check_weights(made: list[tuple[str, Decoder, nnx.State]]) -> None:
  """The weights of each model have the order of its own heads."""
  for _, model, weights in made:
    wanted = launch.compute_weights(model, None)
    jax.tree.map(np.testing.assert_array_equal, *map(nnx.to_pure_dict, (weights, wanted)))
