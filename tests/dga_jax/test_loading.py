"""Loading a model, text in and text out, and the choice of the smaller cache."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import dga_jax
from dga_jax.cache_choice import (
  compact_over_dense,
  equals_dense,
  shortest_saving,
  with_smaller_cache,
)
from dga_jax.chat.template import encode_chat
from dga_jax.config import RETROFIT
from dga_jax.generation import Sampling
from dga_jax.head_budgets import FULL, HeadBudgets
from dga_jax.loading import load_with_facts, Loaded
from dga_jax.model import Decoder, weight_name
from dga_jax.model.attention_kinds.dense_cache import DenseCache
from dga_jax.text_generation import prompt_tokens
from tests.dga_jax.chat import chatty

FOLDER = Path(__file__).parents[1] / "golden" / "hugging_face" / "smollm"
GREEDY = Sampling(temperature=0.0)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return chatty.write_checkpoint(tmp_path_factory.mktemp("model") / "run")


def test_a_checkpoint_answers_messages(workdir: Path) -> None:
  model, tokenizer = dga_jax.load(workdir)
  assert tokenizer.chat_template is not None
  tokens = encode_chat(tokenizer.chat_template, MESSAGES)
  assert prompt_tokens(tokenizer, MESSAGES) == tokens
  text = dga_jax.generate(model, tokenizer, MESSAGES, max_new_tokens=2, sampling=GREEDY)
  logits = nnx.jit(Decoder.__call__)(model, np.array([tokens]))[0, -1]
  first = int(logits.argmax())
  assert first not in tokenizer.stop_ids
  assert text.encode().startswith(tokenizer.token_bytes(first)) or first > 127


def test_weights_in_8_bits_are_made_after_budgets_are_applied() -> None:
  config = dga_jax.load(FOLDER)[0].config
  row = (0,) * config.num_kv_heads
  budgets = HeadBudgets((FULL,), (row,) * config.num_layers)
  model, _ = dga_jax.load(FOLDER, dtype="float32", budgets=budgets, weights="fp8")
  assert (model.config.attention, weight_name(model)) == ("head_budgets", "fp8")
  tokens = np.arange(12)[None] % config.vocab_size
  full, _ = dga_jax.load(FOLDER, dtype="float32", attention="dense", weights="fp8")
  logits = (nnx.jit(Decoder.__call__)(x, tokens) for x in (model, full))
  np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def test_files_of_another_program_are_read_directly() -> None:
  loaded = load_with_facts(FOLDER, attention="dga", dtype="float32")
  config = loaded.model.config
  assert (config.attention, config.dtype, config.dga) == ("dga", "float32", RETROFIT)
  assert loaded.is_imported
  assert loaded.trained_length is not None
  plain, _ = dga_jax.load(FOLDER)
  assert plain.config.attention == "dense"
  jax.tree.map(np.testing.assert_array_equal, *map(nnx.state, (plain, loaded.model)))
  with pytest.raises(ValueError, match=r"step is 3, and .* which have no steps"):
    dga_jax.load(FOLDER, step=3)


def test_default_budgets_replace_the_attention_of_imports_alone(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = dataclasses.replace(chatty.CONFIG, attention="dga", dga=RETROFIT)
  row = (0,) * config.num_kv_heads
  budgets = HeadBudgets((FULL,), (row,) * config.num_layers)
  monkeypatch.setattr("dga_jax.loading.default_budgets", lambda _: budgets)
  imported = chatty.write_checkpoint(tmp_path / "imported", config)
  # The trainer keeps the entry of the import that a run starts from.
  data = {"data": {"sequence_length": 64}}
  trained = chatty.write_checkpoint(tmp_path / "trained", config, entries=data)
  for workdir, attention in ((imported, "head_budgets"), (trained, "dga")):
    loaded = load_with_facts(workdir)
    assert loaded.model.config.attention == attention
    assert loaded.is_imported == (workdir == imported)


def test_budgets_of_heads_are_applied() -> None:
  plain, tokenizer = dga_jax.load(FOLDER, dtype="float32")
  config = plain.config
  rows = [[0] * config.num_kv_heads for _ in range(config.num_layers)]
  budgets = HeadBudgets((FULL,), rows)
  model, _ = dga_jax.load(FOLDER, dtype="float32", budgets=budgets)
  assert (model.config.attention, model.config.head_budgets) == ("head_budgets", budgets)
  text = "the cat sat on the"
  expected, got = (
    dga_jax.generate(decoder, tokenizer, text, max_new_tokens=5, sampling=GREEDY)
    for decoder in (plain, model)
  )
  assert got == expected
  with pytest.raises(ValueError, match="budgets are given; give one of them"):
    dga_jax.load(FOLDER, attention="dga", budgets=budgets)


def test_caches_in_8_bits(tmp_path: Path) -> None:
  model, _ = dga_jax.load(FOLDER, attention="dga", cache_dtype="int8")
  assert model.config.dga == dataclasses.replace(RETROFIT, cache_dtype="int8")
  rows = ((1, *[0] * (model.config.num_kv_heads - 1)),) * model.config.num_layers
  budgets = HeadBudgets((FULL, RETROFIT), rows)
  given, _ = dga_jax.load(FOLDER, budgets=budgets, cache_dtype="float8_e4m3fn")
  assert given.config.head_budgets == budgets.with_cache_dtype("float8_e4m3fn").arranged()
  rows = ((1, 0),) * chatty.CONFIG.num_layers
  budgets = HeadBudgets((FULL, RETROFIT), rows, "float8_e4m3fn")
  config = dataclasses.replace(chatty.CONFIG, attention="head_budgets", head_budgets=budgets)
  workdir = chatty.write_checkpoint(tmp_path / "run", config)
  for cache_dtype, own in ((None, budgets), ("int8", budgets.with_cache_dtype("int8"))):
    stored, _ = dga_jax.load(workdir, cache_dtype=cache_dtype)
    assert stored.config.head_budgets == own.arranged()
  with pytest.raises(ValueError, match="cache_dtype is 'int8', and attention is 'dense'"):
    dga_jax.load(FOLDER, cache_dtype="int8")


def test_a_path_without_a_model(tmp_path: Path) -> None:
  with pytest.raises(
    FileNotFoundError, match="There is no checkpoint, Hugging Face folder or"
  ) as e:
    dga_jax.load(tmp_path / "nowhere")
  assert "hf download" not in str(e.value)
  with pytest.raises(FileNotFoundError, match="hf download some-org/some-model --local-dir some-m"):
    dga_jax.load("some-org/some-model")


def test_a_model_without_a_template() -> None:
  with pytest.raises(ValueError, match="The model has no chat template, which turns messages"):
    prompt_tokens(chatty.tokenizer(template=None), MESSAGES)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("length", [100, 4000])
def test_sizes_are_those_of_the_caches(cache_dtype: str | None, length: int) -> None:
  dga = dataclasses.replace(RETROFIT, cache_dtype=cache_dtype)
  config = dataclasses.replace(chatty.CONFIG, dga=dga, head_dim=16)

  def size(attention: str) -> int:
    kind = dataclasses.replace(config, attention=attention).make_attention()
    shapes = jax.eval_shape(lambda: kind.init_cache(1, length, 2, 16, np.dtype("float32")))
    arrays = shapes.tokens if isinstance(shapes, DenseCache) else shapes.arrays
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))

  assert compact_over_dense(config, length) == pytest.approx(size("dga") / size("dense"), rel=1e-6)


def test_dense_attention_replaces_a_larger_cache(capsys: pytest.CaptureFixture[str]) -> None:
  model = chatty.model(dga=RETROFIT)
  trained = Loaded(model, chatty.tokenizer(), None, is_imported=False)
  imported = trained._replace(is_imported=True)
  assert equals_dense(model.config, 4 + 39 * 32)
  assert not equals_dense(model.config, 4 + 39 * 32 + 1)
  assert shortest_saving(model.config) == 2048

  def choice(loaded: Loaded, length: int, *, is_chosen: bool = False) -> tuple[str, str]:
    made = with_smaller_cache(loaded, length, is_chosen=is_chosen)
    return made.model.config.attention, capsys.readouterr().err

  attention, note = choice(trained, 100)
  assert attention == "dense"
  assert "12.6 times as large" in note
  assert "which computes the same for so short a text; --attention=dga keeps DGA" in note
  assert choice(trained, 100, is_chosen=True)[0] == "dga"
  assert choice(trained, 1300) == ("dga", choice(imported, 1300, is_chosen=True)[1])
  assert choice(imported, 1300)[0] == "dense"
  assert choice(imported, 4000) == ("dga", "")
  unchanged = trained._replace(model=chatty.model(attention="dense"))
  assert choice(unchanged, 100) == ("dense", "")
