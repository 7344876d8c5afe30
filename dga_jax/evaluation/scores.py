"""Scores of answers: intervals for exact match, and the metrics of LongBench and Liu et al."""

import collections
import difflib
import math
import re
import string
from collections.abc import Sequence

Z95 = 1.959964  # A mean ± 1.96 standard errors is a 95 % interval.


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
  """Wilson's score interval for a share with 95 % confidence (Wilson, 1927).

  (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n), with p = hits/n and z = 1.96.

  Raises:
    ValueError: `trials` is below 1, or `hits` is outside 0..trials.
  """
  if trials < 1 or not 0 <= hits <= trials:
    raise ValueError(
      f"hits is {hits} of trials={trials}; trials must be at least 1 and hits from 0 to trials."
    )
  share, z = hits / trials, Z95
  middle = share + z * z / (2 * trials)
  half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
  whole = 1 + z * z / trials
  return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def first_word_match(prediction: str, answer: str) -> bool:
  """Whether the first word or number of the prediction is the answer."""
  found = re.search(r"\w+", prediction)
  return found is not None and found.group() == answer


def normalised(text: str) -> str:
  """SQuAD's normal form: lower case without punctuation, articles and surplus spaces."""
  text = "".join(character for character in text.lower() if character not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
  """Exact match of Liu et al. (arXiv 2307.03172): the first line contains an answer."""
  line = normalised(prediction.partition("\n")[0].strip())
  return any(normalised(answer) in line for answer in answers)


def qa_f1(prediction: str, reference: str) -> float:
  """F1 over the words of the normal forms."""
  predicted, wanted = normalised(prediction).split(), normalised(reference).split()
  same = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
  if same == 0:
    return 0.0
  precision, recall = same / len(predicted), same / len(wanted)
  return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, reference: str) -> float:
  """ROUGE-L of whole summaries, as LongBench computes it with the package `rouge`.

  Every full stop ends a sentence. A word of the reference is found if it is on a longest common
  subsequence of its sentence and any sentence of the prediction. Recall and precision count
  distinct words over all sentences. F1 has the package's 1e-8 in the denominator.
  """
  predicted, wanted = _sentences(prediction), _sentences(reference)
  if not predicted or not wanted:
    return 0.0
  found: set[str] = set()
  for sentence in wanted:
    for other in predicted:
      found |= _common_words(sentence, other)
  recall = len(found) / len({word for sentence in wanted for word in sentence})
  precision = len(found) / len({word for sentence in predicted for word in sentence})
  return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
  """1 / (number of class names in the prediction) if the reference is one of them, else 0.

  A class name that is part of the reference does not count. The official code removes such names
  from the list over which it iterates, and so skips the name after each; this code does the same.
  """
  named = [name for name in classes if name in prediction]
  index = 0
  while index < len(named):
    if named[index] in reference and named[index] != reference:
      named.remove(named[index])
    index += 1
  return 1 / len(named) if reference in named else 0.0


def retrieval(prediction: str, reference: str) -> float:
  """The share of the numbers in the prediction that equal the reference's paragraph number.

  Raises:
    ValueError: the reference does not name a paragraph.
  """
  named = re.search(r"Paragraph (\d+)", reference)
  if named is None:
    raise ValueError(f"reference is {reference!r}; it must name a paragraph ('Paragraph 3').")
  return count(prediction, named.group(1))


def count(prediction: str, reference: str) -> float:
  """The share of the numbers in the prediction that equal the reference."""
  numbers = re.findall(r"\d+", prediction)
  return numbers.count(str(reference)) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, reference: str) -> float:
  """The similarity of the first line without a backquote, # or //, rounded to whole percent.

  difflib's ratio: twice the matching characters over all characters.
  """
  lines = prediction.lstrip("\n").split("\n")
  code = next((line for line in lines if not re.search(r"`|#|//", line)), "")
  return round(100 * difflib.SequenceMatcher(None, code, reference).ratio()) / 100


def _sentences(text: str) -> list[list[str]]:
  # As in the package `rouge`, a sentence of spaces counts as one empty word.
  return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(a: list[str], b: list[str]) -> set[str]:
  """Words on one longest common subsequence, the one that the package `rouge` chooses."""
  length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
  for i, word in enumerate(a, start=1):
    for j, other in enumerate(b, start=1):
      best = max(length[i - 1][j], length[i][j - 1])
      length[i][j] = length[i - 1][j - 1] + 1 if word == other else best
  words, i, j = set(), len(a), len(b)
  while i and j:
    if a[i - 1] == b[j - 1]:
      words.add(a[i - 1])
      i, j = i - 1, j - 1
    elif length[i - 1][j] > length[i][j - 1]:
      i -= 1
    else:
      j -= 1
  return words
