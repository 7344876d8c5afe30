"""Synthetic retrieval tasks: facts hidden in real text, and a question about one of them.

Every prompt has an exact length in tokens. It depends only on (seed, task, length, depth, index),
so all variants of a model get the same prompts.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dga_jax.evaluation.scores import first_word_match, wilson_interval
from dga_jax.tokenizer import Tokenizer

NEW_TOKENS = 12  # An answer is one word or number.


class Hidden(NamedTuple):
  """A sentence and its position in the text, from 0 at the beginning to 1 at the end."""

  depth: float
  sentence: str


class Puzzle(NamedTuple):
  """The hidden sentences, the question at the end of the prompt, and the right answer."""

  hidden: list[Hidden]
  question: str
  answer: str


@dataclasses.dataclass(frozen=True)
class Sample:
  """A prompt, and the word that is the right continuation."""

  tokens: list[int]
  answer: str


_PEOPLE = "baker carpenter doctor farmer gardener judge miller pilot sailor tailor".split()
_PLACES = "attic barn cellar chapel garden kitchen library stable study tower".split()
THINGS = "apple candle compass drum feather hammer lantern mirror ribbon violin".split()
COLOURS = "amber black blue brown green grey orange purple red white".split()


def passkey(rng: random.Random, depth: float, size: int) -> Puzzle:
  """A number that the text calls the pass key."""
  del size
  number = _number(rng)
  fact = f"he pass key number is {number}."
  question = "What is the pass key number? The pass key number is"
  return Puzzle([Hidden(depth, f" T{fact} Remember it: t{fact}")], question, number)


def needle(rng: random.Random, depth: float, size: int) -> Puzzle:
  """A fact in words, unrelated to the text around it."""
  del size
  person, place, thing = rng.choice(_PEOPLE), rng.choice(_PLACES), rng.choice(THINGS)
  fact = f"The {person} of the village keeps in the {place} a large"
  question = f"What does the {person} of the village keep in the {place}? {fact}"
  return Puzzle([Hidden(depth, f" {fact} {thing}.")], question, thing)


def multi_key(rng: random.Random, depth: float, size: int) -> Puzzle:
  """The secret numbers of four people; the question asks for the number at `depth`."""
  del size
  people = rng.sample(_PEOPLE, 4)
  numbers = [_number(rng) for _ in people]
  facts = [f"The secret number of the {person} is" for person in people]
  places = [depth, *(rng.random() for _ in people[1:])]
  hidden = [
    Hidden(place, f" {fact} {number}.")
    for place, fact, number in zip(places, facts, numbers, strict=True)
  ]
  question = f"What is the secret number of the {people[0]}? {facts[0]}"
  return Puzzle(hidden, question, numbers[0])


def key_value(rng: random.Random, depth: float, size: int) -> Puzzle:
  """Table entries scattered over the text, one in 128 tokens; the question asks for one of them."""
  entries = max(2, min(size // 128, len(COLOURS) * len(THINGS)))
  names = rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], entries)
  numbers = [_number(rng) for _ in names]
  places = [depth, *(rng.random() for _ in names[1:])]
  hidden = [
    Hidden(place, f" [{name}: {number}]")
    for place, name, number in zip(places, names, numbers, strict=True)
  ]
  return Puzzle(hidden, f"The entry of the {names[0]} was:\n[{names[0]}:", numbers[0])


def variable_tracking(rng: random.Random, depth: float, size: int) -> Puzzle:
  """A number that is assigned from variable to variable, and a second chain as a distractor.

  The first assignment is at `depth`; the later ones are spaced evenly between it and the end.
  """
  del size
  letters = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 6)
  chains, numbers = (letters[:3], letters[3:]), (_number(rng), _number(rng))
  hidden = []
  for chain, number, first in zip(chains, numbers, (depth, rng.random()), strict=True):
    values = [number, *(f"variable {name}" for name in chain[:-1])]
    for hop, (name, value) in enumerate(zip(chain, values, strict=True)):
      place = first + (1 - first) * hop / len(chain)
      hidden.append(Hidden(place, f" Let variable {name} be equal to {value}."))
  last = chains[0][-1]
  question = f"What number is variable {last} equal to? Variable {last} is equal to"
  return Puzzle(hidden, question, numbers[0])


TASKS: dict[str, Callable[[random.Random, float, int], Puzzle]] = {
  "passkey": passkey,
  "needle": needle,
  "multi_key": multi_key,
  "key_value": key_value,
  "variable_tracking": variable_tracking,
}


class Haystack:
  """The tokens of real texts in which facts are hidden.

  Args:
    texts: long texts; a prompt uses a piece of one of them.
    tokenizer: of the model.

  Attributes:
    fingerprint: a hash of the texts' tokens.

  Raises:
    ValueError: there is no text.
  """

  def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
    if not texts:
      raise ValueError("texts is empty; it must have at least one text.")
    self._tokenizer = tokenizer
    self._texts = tokenizer.encode_batch(texts)
    self.fingerprint = hashlib.sha256(repr(self._texts).encode()).hexdigest()
    vocabulary = range(tokenizer.vocab_size)
    self._ends = {token for token in vocabulary if _ends_sentence(tokenizer, token)}

  def sample(self, task: str, length: int, depth: float, *, seed: int, index: int) -> Sample:
    """A prompt that takes `length` tokens together with its answer.

    Args:
      task: a name in TASKS.
      length: tokens of the prompt and the answer.
      depth: position of the answer's sentence, from 0 to 1.
      seed: of the text, the facts and their positions.
      index: number of the sample.

    Raises:
      ValueError: an unknown task, or no text is long enough.
    """
    if task not in TASKS:
      raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}.")
    rng = random.Random(f"{seed} {task} {length} {depth:.6f} {index}")
    puzzle = TASKS[task](rng, depth, length)
    prompt = self.hide(puzzle.hidden, puzzle.question, length - NEW_TOKENS, rng)
    return Sample(prompt, puzzle.answer)

  def hide(
    self, hidden: Sequence[Hidden], question: str, length: int, rng: random.Random, intro: str = ""
  ) -> list[int]:
    """A prompt of exactly `length` tokens: intro, a piece of text with the sentences, question.

    Args:
      hidden: sentences, each inserted after the end of a sentence of the text.
      question: the end of the prompt.
      length: tokens of the prompt, with the tokens that start a document.
      rng: chooses the text and the piece.
      intro: the beginning of the prompt; "" for none.

    Raises:
      ValueError: no text is long enough, or the sentences leave no room for text.
    """
    encode = self._tokenizer.encode
    placed = sorted((one.depth, encode(one.sentence)) for one in hidden)
    end = encode(f"\n\n{question}")
    start = [*self._tokenizer.start_ids, *(encode(f"{intro}\n\n") if intro else [])]
    used = sum(len(tokens) for _, tokens in placed) + len(start) + len(end)
    piece = self._piece(rng, length - used)
    return [*start, *self._insert(piece, placed), *end]

  def _piece(self, rng: random.Random, size: int) -> list[int]:
    fitting = [text for text in self._texts if len(text) >= size]
    if size < 1 or not fitting:
      raise ValueError(
        f"length leaves {size} tokens for the text around the facts; it must leave from 1 to"
        f" {max(map(len, self._texts))}, the tokens of the longest text."
      )
    text = rng.choice(fitting)
    start = rng.randrange(len(text) - size + 1)
    return text[start : start + size]

  def _insert(self, piece: list[int], hidden: list[tuple[float, list[int]]]) -> list[int]:
    """Inserts each hidden sentence at the end of a sentence, the end closest to its depth."""
    places = [i + 1 for i, token in enumerate(piece) if token in self._ends] or [0, len(piece)]
    tokens, done = [], 0
    for depth, sentence in hidden:
      gaps = [abs(place - depth * len(piece)) for place in places]
      place = places[gaps.index(min(gaps))]
      tokens += piece[done:place] + sentence
      done = place
    return tokens + piece[done:]


def exact_match(predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
  """Counts predictions whose first word is the answer.

  Returns:
    "hits", "samples", "share", and "low" and "high" of Wilson's 95 % interval.
  """
  pairs = zip(predictions, samples, strict=True)
  hits = sum(first_word_match(prediction, sample.answer) for prediction, sample in pairs)
  low, high = wilson_interval(hits, len(samples))
  return {
    "hits": hits,
    "samples": len(samples),
    "share": hits / len(samples),
    "low": low,
    "high": high,
  }


def _number(rng: random.Random) -> str:
  return str(rng.randrange(10_000, 100_000))


def _ends_sentence(tokenizer: Tokenizer, token: int) -> bool:
  return tokenizer.token_bytes(token).rstrip().endswith((b".", b"!", b"?"))
