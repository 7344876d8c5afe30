"""Sessions, conversations and documents: a cache that continues equals one that is made anew."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import dga_jax.chat.session
from dga_jax.chat.conversation import Conversation, DocumentReader, split_prompt, tokens_after
from dga_jax.chat.session import Session
from dga_jax.chat.template import encode_chat
from dga_jax.generation import generate, Sampling
from dga_jax.generation.sampling import sample, SamplingParams
from dga_jax.head_budgets import HeadBudgets, SinkWindow
from dga_jax.model import apply_budgets, quantize_weights, weight_name
from dga_jax.model.attention_kinds.sliding_window import SlidingWindowConfig
from pallas_kernels.target import Target
from tests.dga_jax.chat import chatty
from tests.dga_jax.evaluation.tiny import STORY

GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=0.9, seed=3)
TOKENIZER = chatty.tokenizer()
TEXT = STORY[:100].strip()


MODELS = {kind: chatty.model(attention=kind) for kind in ("dga", "dense")}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
  """Its compiled programs serve all tests of the module; its capacities are small."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in (("_LEAST_CAPACITY", 256), ("_SHORT", 32), ("_LONG", 32)):
      patch.setattr(dga_jax.chat.session, name, value)
    yield Session(MODELS["dga"])


@pytest.fixture(autouse=True)
def _clear(request: pytest.FixtureRequest) -> Iterator[None]:
  yield
  if "session" in request.fixturenames:
    request.getfixturevalue("session").clear()


jitted_sample = jax.jit(sample)


@jax.jit(static_argnames="kind")
def last_logits(kind: str, tokens_1xL: jax.Array, length: int) -> jax.Array:
  return MODELS[kind](tokens_1xL, lengths=length[None])[:, length - 1]


def whole(session: Session, tokens: Sequence[int], sampling: Sampling, count: int) -> list[int]:
  """The continuation without a cache: each token from a forward of the whole sequence."""
  params = SamplingParams.from_samplings([sampling])
  new: list[int] = []
  for step in range(count):
    padded_1xL = np.zeros((1, 320), np.int32)
    sequence = [*tokens, *new]
    padded_1xL[0, : len(sequence)] = sequence
    logits_1xV = last_logits(session.model.config.attention, padded_1xL, np.int32(len(sequence)))
    new.append(int(jitted_sample(logits_1xV, params, np.array([step], np.int32))[0]))
  return new


def test_tokens_in_parts_are_those_of_a_whole_prompt(session: Session) -> None:
  tokens = TOKENIZER.encode(STORY)[:150]
  session.read(tokens[:70])
  session.read(tokens[70:73])
  session.read(tokens[73:])
  new = list(session.generate(SAMPLED, max_new_tokens=8, stop_ids=()))
  assert new == whole(session, tokens, SAMPLED, 8)
  assert session.tokens == [*tokens, *new]
  session.read([7])
  again = list(session.generate(GREEDY, max_new_tokens=3, stop_ids=()))
  assert again == whole(session, [*tokens, *new, 7], GREEDY, 3)


def test_a_dense_cache_that_grows() -> None:
  session = Session(MODELS["dense"])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dga_jax.chat.session, "_LEAST_CAPACITY", 64)
    tokens = TOKENIZER.encode(STORY)[:62]
    session.read(tokens)
    new = list(session.generate(GREEDY, max_new_tokens=4, stop_ids=()))
  assert new == whole(session, tokens, GREEDY, 4)


BUDGETS = HeadBudgets(
  ("full", chatty.CONFIG.dga, SinkWindow(8, 2)), tuple((i % 3, 2) for i in range(2))
)
CONTINUING = {
  "head_budgets": lambda: apply_budgets(MODELS["dense"], BUDGETS),
  "sliding_window": lambda: chatty.model(
    attention="sliding_window", sliding_window=SlidingWindowConfig(10)
  ),
}


@pytest.mark.parametrize("name", CONTINUING)
def test_caches_of_other_models_grow_and_are_stored(
  name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  for constant, value in (("_LEAST_CAPACITY", 16), ("_SHORT", 8), ("_LONG", 8)):
    monkeypatch.setattr(dga_jax.chat.session, constant, value)
  model, tokens = CONTINUING[name](), TOKENIZER.encode(STORY)[:20]
  session = Session(model)
  session.read(tokens[:9])
  session.read(tokens[9:])
  new = list(session.generate(GREEDY, max_new_tokens=6, stop_ids=()))
  assert new == generate(model, [tokens], max_new_tokens=6, sampling=GREEDY).tokens[0]
  restored = session.fork()
  restored.restore(session.tokens, session.cache())
  for one in (session, restored):
    one.read([65])
  first, second = (
    list(one.generate(GREEDY, max_new_tokens=3, stop_ids=())) for one in (session, restored)
  )
  assert first == second


def test_weights_in_8_bits_stay_so() -> None:
  assert weight_name(Session(quantize_weights(MODELS["dense"], "int8")).model) == "int8"


def test_programs_have_one_layer_for_any_number_of_layers() -> None:
  def equations(num_layers: int) -> list[int]:
    session = Session(chatty.model(num_layers=num_layers))
    cache = jax.eval_shape(lambda: session.model.init_cache(1, 512))
    one = np.ones(1, np.int32)
    params = SamplingParams.from_samplings([GREEDY])
    read = (session._reader_params, cache, np.zeros((1, 64), np.int32), one)
    step = (session._decoder_params, cache, one, params, one)
    programs = ((session._extend_program, read), (session._step_program, step))
    return [len(jax.make_jaxpr(program)(*arguments).eqns) for program, arguments in programs]

  assert equations(2) == equations(5)


def test_accelerators_decode_with_unstacked_layers(monkeypatch: pytest.MonkeyPatch) -> None:
  gpu = Target("gpu", "NVIDIA H100", 9.0, 132)
  monkeypatch.setattr(dga_jax.chat.session, "find_target", lambda: gpu)
  session = Session(MODELS["dga"])
  monkeypatch.undo()
  tokens = TOKENIZER.encode(TEXT)[:20]
  session.read(tokens)
  assert list(session.generate(GREEDY, max_new_tokens=4, stop_ids=())) == whole(
    session, tokens, GREEDY, 4
  )
  assert jax.tree.structure(session._decoder_params) != jax.tree.structure(session._reader_params)


def test_a_stop_token_is_not_read(session: Session) -> None:
  session.read([5, 6, 7])
  (first, second, third) = session.fork().generate(SAMPLED, max_new_tokens=3, stop_ids=())
  assert third not in (first, second)
  assert list(session.generate(SAMPLED, max_new_tokens=9, stop_ids=[third])) == [first, second]
  assert session.tokens == [5, 6, 7, first, second]


def test_a_fork_does_not_change_its_origin(session: Session) -> None:
  session.read(TOKENIZER.encode("The carrier"))
  other = session.fork()
  other.read(TOKENIZER.encode(" of doubt"))
  session.read(TOKENIZER.encode(" stopped"))
  wanted = whole(session, TOKENIZER.encode("The carrier stopped"), GREEDY, 4)
  assert list(session.generate(GREEDY, max_new_tokens=4, stop_ids=())) == wanted


def test_stored_caches_continue(session: Session) -> None:
  tokens = TOKENIZER.encode(TEXT)
  session.read(tokens)
  cache = session.cache()
  session.restore(tokens, cache)
  session.read([65])
  new = list(session.generate(GREEDY, max_new_tokens=4, stop_ids=()))
  assert new == whole(session, [*tokens, 65], GREEDY, 4)


def test_misuse_is_refused(session: Session) -> None:
  with pytest.raises(ValueError, match="at least one token id"):
    session.read([])
  with pytest.raises(ValueError, match="ids from 0 to 258"):
    session.read([259])
  with pytest.raises(ValueError, match="read a prompt first"):
    next(session.generate(GREEDY, max_new_tokens=1, stop_ids=()))
  with pytest.raises(ValueError, match="has no tokens"):
    session.cache()


def test_kinds_that_cannot_continue_are_refused() -> None:
  with pytest.raises(ValueError, match="attention is 'minference', whose cache does not continue"):
    Session(chatty.model(attention="minference"))
  ranked = dataclasses.replace(chatty.CONFIG.dga, selection="global", local_window=0)
  with pytest.raises(ValueError, match="selection is 'global', which ranks all tokens"):
    Session(chatty.model(dga=ranked))


def test_logits_that_are_not_finite_end_a_session(session: Session) -> None:
  broken = session.fork()
  broken._reader_params = jax.tree.map(lambda x: x * float("inf"), session._reader_params)
  broken.read([1, 2])
  with pytest.raises(FloatingPointError, match="NaN or infinite after 2 tokens"):
    next(broken.generate(GREEDY, max_new_tokens=1, stop_ids=()))


def conversation(session: Session, template: str = chatty.TURNS) -> Conversation:
  tokenizer = chatty.tokenizer(template)
  assert tokenizer.chat_template is not None
  return Conversation(session, tokenizer, tokenizer.chat_template, system="Be brief.")


def test_each_turn_is_read_once(session: Session) -> None:
  talk = conversation(session)
  replies = [
    "".join(talk.ask(text, sampling=SAMPLED, max_new_tokens=12))
    for text in ("Hello", "And <|stop|> now?")
  ]
  assert talk.rereads == 0
  roles = [message["role"] for message in talk.messages]
  assert roles == ["system", "user", "assistant", "user", "assistant"]
  assert [message["content"] for message in talk.messages[2::2]] == replies
  assert session.tokens.count(TOKENIZER.end_id) == 4  # After four messages, and not in a message.


def test_the_second_reply_is_that_of_the_whole_conversation(session: Session) -> None:
  talk = conversation(session)
  list(talk.ask("Hello", sampling=GREEDY, max_new_tokens=5))
  talk.messages[-1]["content"] = talk._reply = "Hi"  # A reply that encodes to its own tokens.
  session.clear()
  session.read(encode_chat(talk._template, talk.messages[:2]))
  session.read(TOKENIZER.encode("Hi"))
  again = "".join(talk.ask("More", sampling=GREEDY, max_new_tokens=5))
  prompt = encode_chat(talk._template, talk.messages[:-1])
  assert session.tokens[: len(prompt)] == prompt
  assert again == TOKENIZER.decode(whole(session, prompt, GREEDY, 5))
  assert talk.rereads == 0


def test_a_template_that_changes_earlier_turns_reads_again(session: Session) -> None:
  talk = conversation(session, "{{ messages | length }}" + chatty.TURNS)
  for text in ("Hello", "More"):
    list(talk.ask(text, sampling=GREEDY, max_new_tokens=3))
  assert talk.rereads == 1
  prompt = encode_chat(talk._template, talk.messages[:-1])
  assert session.tokens[: len(prompt)] == prompt


def test_a_reply_can_be_ended(session: Session) -> None:
  talk = conversation(session)
  pieces = talk.ask("Hello", sampling=SAMPLED, max_new_tokens=30)
  start = next(pieces) + next(pieces)
  pieces.close()  # type: ignore[attr-defined]
  assert talk.messages[-1] == {"role": "assistant", "content": start}
  list(talk.ask("More", sampling=GREEDY, max_new_tokens=3))
  assert talk.rereads == 0


def test_a_message_whose_reading_is_interrupted_is_forgotten(
  session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
  talk, read_chunk, chunks = conversation(session), session._read_chunk, []

  def interrupted(*chunk: Any) -> None:
    if len(chunks) == 2:
      raise KeyboardInterrupt
    chunks.append(chunk)
    read_chunk(*chunk)

  monkeypatch.setattr(session, "_read_chunk", interrupted)
  with pytest.raises(KeyboardInterrupt):
    list(talk.ask("Hello. " * 20, sampling=GREEDY, max_new_tokens=3))
  assert session.tokens == []
  monkeypatch.undo()
  list(talk.ask("More", sampling=GREEDY, max_new_tokens=3))
  messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "More"}]
  prompt = encode_chat(talk._template, messages)
  assert session.tokens[: len(prompt)] == prompt
  assert talk.messages[:2] == messages


@pytest.mark.parametrize("template", [chatty.TURNS, None])
def test_answers_are_those_of_the_whole_prompt(session: Session, template: str | None) -> None:
  tokenizer = chatty.tokenizer(template)
  chat = tokenizer.chat_template
  reader = DocumentReader.read(session, tokenizer, chat, f"{TEXT}\n")
  read = list(session.tokens)
  for question in ("Who <|stop|> called?", "Why?"):
    if chat is None:
      prompt = tokenizer.encode(f"{TEXT}\n\nQuestion: {question}\nAnswer:")
    else:
      content = f"{TEXT}\n\n{question}"
      prompt = encode_chat(chat, [{"role": "user", "content": content}])
    assert prompt[: len(read)] == read
    answer = "".join(reader.ask(question, sampling=GREEDY, max_new_tokens=4))
    assert answer == tokenizer.decode(whole(session, prompt, GREEDY, 4))
  assert session.tokens == read


def test_documents_that_are_refused(session: Session) -> None:
  chat = TOKENIZER.chat_template
  with pytest.raises(ValueError, match="The document is empty"):
    split_prompt(" \n", chat)
  twice = chatty.tokenizer(chatty.TURNS * 2).chat_template
  with pytest.raises(ValueError, match="writes a message 2 times"):
    split_prompt("text", twice)
  reader = DocumentReader.read(session, TOKENIZER, chat, "text")
  with pytest.raises(ValueError, match="A question is empty"):
    next(reader.ask(" ", sampling=GREEDY, max_new_tokens=1))


def test_tokens_after_what_was_read() -> None:
  def encode(text: str) -> list[int]:
    return [9, *map(len, text.split())]

  assert tokens_after([9, 1], encode, "a bb", " bb") == [2]
  assert tokens_after([9, 7], encode, "a bb", "bb") == [2]
