"""The tasks of RULER (Hsieh et al., arXiv 2404.06654), made by code from the user's documents.

The rules, counts and scores are the paper's; the sentences are not. The needle tasks and variable
tracking hide sentences in the documents. The word tasks list words of the documents (common words)
or made-up words (frequent words). `ruler_qa` reads questions from the files of SQuAD and HotpotQA.

A prompt depends only on (seed, task, length, index) and the texts.
"""

import math
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dga_jax.evaluation.retrieval import COLOURS, Haystack, Hidden, THINGS
from dga_jax.tokenizer import Tokenizer

_NEEDLES = 4  # Keys, values or queries of the tasks with several.
_CHAIN = 5  # Variables of a chain: one assignment and four hops.
_COMMON_WORDS = 10
_FREQUENT_WORDS = 3
_ZIPF_EXPONENT = 2.0
_CODED_LETTERS = 6
_CODED_WORDS = 2000  # More than a text of two million words has.
_WORD = re.compile(r"\b[a-z]{4,12}\b")
_INTRO = "Read the text and remember the facts that do not belong to it."


class RulerPrompt(NamedTuple):
  """A prompt and its answers.

  Attributes:
    tokens: of the prompt.
    answers: strings that the continuation must contain.
  """

  tokens: list[int]
  answers: tuple[str, ...]


class RulerPart(NamedTuple):
  """The prompts of one task at one length.

  Attributes:
    name: of the task, for tables.
    prompts: with their answers.
    score: from 0 to 1, of a prediction and the answers.
    new_tokens: largest number of tokens of an answer.
  """

  name: str
  prompts: list[RulerPrompt]
  score: Callable[[str, Sequence[str]], float]
  new_tokens: int


class _Task(NamedTuple):
  """A task: how its prompts are made, and the largest number of tokens of an answer."""

  make: Callable[["RulerTexts", random.Random, int], RulerPrompt]
  new_tokens: int


class RulerTexts:
  """The documents from which prompts are made.

  Args:
    texts: long texts.
    tokenizer: of the model.
  """

  def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
    self.tokenizer = tokenizer
    self.hay = Haystack(texts, tokenizer)
    self.words = sorted({word for text in texts for word in _WORD.findall(text)})

  def sample(self, task: str, length: int, *, seed: int, index: int) -> RulerPrompt:
    """A prompt that takes at most `length` tokens together with its answer.

    Args:
      task: a name in RULER_TASKS.
      length: tokens of the prompt and the answer.
      seed: of the text, the facts and their positions.
      index: number of the prompt.

    Raises:
      ValueError: an unknown task, or the texts or the length are too short.
    """
    if task not in RULER_TASKS:
      raise ValueError(f"task is {task!r}; it must be one of {', '.join(RULER_TASKS)}.")
    make, new_tokens = RULER_TASKS[task]
    rng = random.Random(f"{seed} ruler {task} {length} {index}")
    return make(self, rng, length - new_tokens)

  def part(self, task: str, length: int, samples: int, seed: int) -> RulerPart:
    """The first `samples` prompts of a task; arguments and errors as for `sample`."""
    prompts = [self.sample(task, length, seed=seed, index=index) for index in range(samples)]
    return RulerPart(task, prompts, ruler_recall, RULER_TASKS[task].new_tokens)


def ruler_recall(prediction: str, answers: Sequence[str]) -> float:
  """The share of the answers that the prediction contains as whole words, whatever their case.

  RULER counts parts of words too.
  """
  found = [re.search(rf"\b{re.escape(answer)}\b", prediction, re.IGNORECASE) for answer in answers]
  return sum(match is not None for match in found) / len(answers)


def fit(
  tokenizer: Tokenizer, render: Callable[[int], str], length: int, least: int, most: int
) -> list[int]:
  """The tokens of render(n) for the largest n whose prompt has at most `length` tokens.

  Args:
    tokenizer: of the model.
    render: the prompt's text with n units; more units take more tokens.
    length: of the prompt, with the tokens that start a document.
    least: the smallest n.
    most: the largest n.

  Raises:
    ValueError: the prompt with the smallest n is too long.
  """

  def encode(units: int) -> list[int]:
    return [*tokenizer.start_ids, *tokenizer.encode(render(units))]

  def fits(units: int) -> bool:
    return len(encode(units)) <= length

  if not fits(least):
    raise ValueError(
      f"length leaves {length} tokens for a prompt; the smallest takes {len(encode(least))}:"
      " raise --lengths."
    )
  low, high = least, most + 1
  while high - low > 1:
    middle = min((low + high) // 2, 2 * low)  # Texts far beyond the length are slow to encode.
    low, high = (middle, high) if fits(middle) else (low, middle)
  return encode(low)


def _single(texts: RulerTexts, rng: random.Random, length: int) -> RulerPrompt:
  (key,), (value,) = _keys(rng, 1), _values(rng, 1)
  return _ask_one(texts, rng, length, [(key, value)])


def _multi_key(texts: RulerTexts, rng: random.Random, length: int) -> RulerPrompt:
  pairs = zip(_keys(rng, _NEEDLES), _values(rng, _NEEDLES), strict=True)
  return _ask_one(texts, rng, length, list(pairs))


def _ask_one(
  texts: RulerTexts, rng: random.Random, length: int, pairs: list[tuple[str, str]]
) -> RulerPrompt:
  """Asks for the code of the first pair."""
  key, value = pairs[0]
  question = f"Which code of the {key} does the text give? The code of the {key} is"
  return _with_needles(texts, rng, length, pairs, question, (value,))


def _multi_value(texts: RulerTexts, rng: random.Random, length: int) -> RulerPrompt:
  (key,), values = _keys(rng, 1), _values(rng, _NEEDLES)
  question = f"Which {_NEEDLES} codes of the {key} does the text give? The codes of the {key} are"
  pairs = [(key, value) for value in values]
  return _with_needles(texts, rng, length, pairs, question, tuple(values))


def _multi_query(texts: RulerTexts, rng: random.Random, length: int) -> RulerPrompt:
  keys, values = _keys(rng, _NEEDLES), _values(rng, _NEEDLES)
  listed = ", ".join(f"the {key}" for key in keys)
  question = f"Which codes does the text give of {listed}? The codes of {listed} are"
  pairs = list(zip(keys, values, strict=True))
  return _with_needles(texts, rng, length, pairs, question, tuple(values))


def _with_needles(
  texts: RulerTexts,
  rng: random.Random,
  length: int,
  pairs: Sequence[tuple[str, str]],
  question: str,
  answers: tuple[str, ...],
) -> RulerPrompt:
  hidden = [Hidden(rng.random(), f" One code of the {key} is {value}.") for key, value in pairs]
  return RulerPrompt(texts.hay.hide(hidden, question, length, rng, _INTRO), answers)


def _variable_tracking(texts: RulerTexts, rng: random.Random, length: int) -> RulerPrompt:
  """A value that is assigned from variable to variable; the question asks for all of them."""
  names = _distinct(_CHAIN, lambda: "".join(rng.choices(string.ascii_uppercase, k=5)))
  (value,) = _values(rng, 1)
  sources = [value, *(f"the value of {name}" for name in names[:-1])]
  depths = sorted(rng.random() for _ in names)
  hidden = [
    Hidden(depth, f" Variable {name} takes {source}.")
    for depth, name, source in zip(depths, names, sources, strict=True)
  ]
  question = (
    f"Which {_CHAIN} variables have the value {value}? The variables with the value {value} are"
  )
  return RulerPrompt(texts.hay.hide(hidden, question, length, rng, _INTRO), tuple(names))


def _common_words(texts: RulerTexts, rng: random.Random, length: int) -> RulerPrompt:
  """A shuffled list of words: ten are repeated ten times as often as all others."""
  often, seldom = (30, 3) if length >= 3072 else (10, 1)
  words = rng.sample(texts.words, len(texts.words))
  common, others = words[:_COMMON_WORDS], words[_COMMON_WORDS:]
  if not others:
    raise ValueError(
      f"the documents have {len(words)} different words of 4 to 12 letters; common_words needs"
      f" more than {_COMMON_WORDS}. Give longer documents."
    )
  order = rng.randrange(2**32)

  def render(units: int) -> str:
    listed = common * often + others[:units] * seldom
    random.Random(order).shuffle(listed)
    items = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
    return (
      f"The list has some words many times and the others few times.\n\n{items}\n\nWhich"
      f" {_COMMON_WORDS} words are most often in the list? The {_COMMON_WORDS} words are"
    )

  return RulerPrompt(fit(texts.tokenizer, render, length, 1, len(others)), tuple(common))


def _frequent_words(texts: RulerTexts, rng: random.Random, length: int) -> RulerPrompt:
  """Made-up words, the k-th of which has a share of k^-2 of the text (Zipf's law)."""

  def make_word() -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))

  words = _distinct(_CODED_WORDS, make_word)
  order = rng.randrange(2**32)

  def render(units: int) -> str:
    counts = zipf_counts(units)
    listed = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
    random.Random(order).shuffle(listed)
    return (
      f"The text consists of made-up words.\n\n{' '.join(listed)}\n\nWhich {_FREQUENT_WORDS} words"
      f" are most often in the text? The {_FREQUENT_WORDS} words are"
    )

  least = next(n for n in range(1, 1000) if _is_decided(zipf_counts(n)))
  return RulerPrompt(
    fit(texts.tokenizer, render, length, least, length), tuple(words[:_FREQUENT_WORDS])
  )


def zipf_counts(total: int) -> list[int]:
  """How often the first, second, … of words occurs in a text of about `total` words.

  ⌊total·k^-2/ζ⌋ for rank k while that is at least 1, with ζ = Σ k^-2 = π²/6.
  """
  shares = (total * rank**-_ZIPF_EXPONENT / (math.pi**2 / 6) for rank in range(1, _CODED_WORDS))
  return [int(count) for count in shares if count >= 1]


def _is_decided(counts: Sequence[int]) -> bool:
  """Whether the asked words are more frequent than all others."""
  return len(counts) > _FREQUENT_WORDS and counts[_FREQUENT_WORDS - 1] > counts[_FREQUENT_WORDS]


def _keys(rng: random.Random, count: int) -> list[str]:
  return rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], count)


def _values(rng: random.Random, count: int) -> list[str]:
  return _distinct(count, lambda: str(rng.randrange(10**6, 10**7)))


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
  """The first `count` different draws."""
  found: dict[str, Any] = {}
  while len(found) < count:
    found[draw()] = None
  return list(found)


RULER_TASKS: dict[str, _Task] = {
  "single": _Task(_single, 128),
  "multi_key": _Task(_multi_key, 128),
  "multi_value": _Task(_multi_value, 128),
  "multi_query": _Task(_multi_query, 128),
  "variable_tracking": _Task(_variable_tracking, 30),
  "common_words": _Task(_common_words, 120),
  "frequent_words": _Task(_frequent_words, 50),
}
