"""The cache of a document in a file: it continues, and other and damaged files are refused."""

import dataclasses
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from dga_jax.chat.cache_file import load_cache, save_cache, stored_attention
from dga_jax.chat.conversation import DocumentReader
from dga_jax.chat.session import Session
from dga_jax.generation import Sampling
from dga_jax.head_budgets import HeadBudgets, SinkWindow
from dga_jax.model import apply_budgets
from tests.dga_jax.chat import chatty
from tests.dga_jax.evaluation.tiny import STORY

GREEDY = Sampling(temperature=0.0)
TOKENIZER = chatty.tokenizer()


@pytest.fixture(scope="module")
def session() -> Session:
  return Session(chatty.model(dtype="bfloat16"))


@pytest.fixture(scope="module")
def stored(session: Session, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
  """A file, and the answer of the session that wrote it."""
  path = tmp_path_factory.mktemp("stored") / "folder" / "story.npz"
  chat = TOKENIZER.chat_template
  reader = DocumentReader.read(session, TOKENIZER, chat, STORY)
  size = save_cache(path, session, reader, TOKENIZER, chat)
  assert size == path.stat().st_size
  assert [file.name for file in path.parent.iterdir()] == ["story.npz"]
  return path, "".join(reader.ask("Who?", sampling=GREEDY, max_new_tokens=6))


def test_a_stored_document_answers_alike(session: Session, stored: tuple[Path, str]) -> None:
  path, answer = stored
  read = list(session.tokens)
  session.clear()
  reader = load_cache(path, session, TOKENIZER, TOKENIZER.chat_template)
  assert session.tokens == read
  assert "".join(reader.ask("Who?", sampling=GREEDY, max_new_tokens=6)) == answer
  assert stored_attention(path) == "dga"


def test_a_document_in_8_bits_is_stored_as_it_is(tmp_path: Path) -> None:
  rows = ((0,) * chatty.CONFIG.num_kv_heads, (1,) * chatty.CONFIG.num_kv_heads)
  budgets = HeadBudgets(("full", SinkWindow(8, 2)), rows, "int8")
  model, chat = chatty.model(attention="dense", dtype="bfloat16"), TOKENIZER.chat_template
  session, path = Session(apply_budgets(model, budgets)), tmp_path / "story.npz"
  reader = DocumentReader.read(session, TOKENIZER, chat, STORY)
  save_cache(path, session, reader, TOKENIZER, chat)
  restored = Session(session.model)
  load_cache(path, restored, TOKENIZER, chat)
  leaves = [jax.tree.leaves(one.cache()) for one in (session, restored)]
  assert {str(x.dtype) for x in leaves[0]} == {"int8", "float32", "int32"}
  held = [x.nbytes for x in jax.tree.leaves(session._cache) if x.dtype != np.int32]
  assert session.cache_bytes == sum(held)
  for one, other in zip(*leaves, strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
  other = Session(apply_budgets(model, dataclasses.replace(budgets, cache_dtype="float8_e4m3fn")))
  with pytest.raises(ValueError, match=r"head_budgets\.cache_dtype 'int8'.*has 'float8_e4m3fn'"):
    load_cache(path, other, TOKENIZER, chat)


def changed(**changes: object) -> Session:
  return Session(chatty.model(**{"dtype": "bfloat16", **changes}))


@pytest.mark.parametrize("name", ["layers", "dga", "attention", "dtype", "weights", "tokenizer"])
def test_a_file_of_another_model_is_refused(name: str, stored: tuple[Path, str]) -> None:
  path, _ = stored
  other, tokenizer = chatty.tokenizer(chatty.TURNS + " "), TOKENIZER
  if name == "layers":
    session, message = changed(num_layers=3), "num_layers 2; this model has 3"
  elif name == "dga":
    dga = dataclasses.replace(chatty.CONFIG.dga, group_size=4)
    session, message = changed(dga=dga), r"dga\.group_size 3; this model has 4"
  elif name == "attention":
    session, message = changed(attention="dense"), "attention 'dga'; this model has 'dense'"
  elif name == "dtype":
    session, message = changed(dtype="float32"), "dtype 'bfloat16'; this model has 'float32'"
  elif name == "weights":
    session, message = changed(), "another weights"
    session.model = jax.tree.map(lambda x: x * 2, session.model)
  else:
    session, message, tokenizer = changed(), "another tokenizer", chatty.tokenizer()
    tokenizer._ours = {**tokenizer._ours, "stop": [1]}
  with pytest.raises(ValueError, match=f"story.npz belongs to a model with {message}"):
    load_cache(path, session, tokenizer, TOKENIZER.chat_template)
  if name == "tokenizer":
    for chat in (None, other.chat_template):
      with pytest.raises(ValueError, match=r"another chat template\. Pass --chat as it was passed"):
        load_cache(path, session, TOKENIZER, chat)


def test_other_files_are_refused(session: Session, tmp_path: Path) -> None:
  chat = TOKENIZER.chat_template
  with pytest.raises(FileNotFoundError):
    load_cache(tmp_path / "nowhere.npz", session, TOKENIZER, chat)
  path = tmp_path / "a.npz"
  np.savez(path, header=np.frombuffer(b'{"format": "other"}', np.uint8))
  with pytest.raises(ValueError, match=r"a\.npz is not a cache that --save_cache wrote\."):
    load_cache(path, session, TOKENIZER, chat)
  np.savez(path, header=np.frombuffer(b'{"format": "dga-jax cache", "version": 9}', np.uint8))
  with pytest.raises(ValueError, match="has version 9 of the cache format"):
    load_cache(path, session, TOKENIZER, chat)
  np.savez(path, header=np.array([object()]))
  with pytest.raises(ValueError, match="is damaged, or not a cache"):
    load_cache(path, session, TOKENIZER, chat)


def test_damaged_files_are_refused_or_read_alike(
  session: Session, stored: tuple[Path, str]
) -> None:
  """A changed byte in an unused field of the zip format is harmless."""
  path, _ = stored
  content = path.read_bytes()
  copy = path.with_name("copy.npz")
  chat = TOKENIZER.chat_template
  load_cache(path, session, TOKENIZER, chat)
  whole = jax.tree.leaves(session.cache())
  draw = random.Random(1)
  read = refused = alike = 0
  for _ in range(60):
    if draw.random() < 0.2:
      damaged = content[: draw.randrange(len(content))]
    else:
      at = draw.randrange(len(content))
      damaged = content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    copy.write_bytes(damaged)
    read += 1
    try:
      load_cache(copy, session, TOKENIZER, chat)
    except ValueError as error:
      refused += "copy.npz" in str(error)
    else:
      for a, b in zip(whole, jax.tree.leaves(session.cache()), strict=True):
        np.testing.assert_array_equal(a, b)
      alike += 1
  assert refused > 40
  assert refused + alike == read
