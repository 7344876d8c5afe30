"""Texts in which facts are told and asked for later, made from long texts by code.

A document is a piece of a text. Facts and questions are paragraphs of their own between the
paragraphs of the piece. A question and its answer come after the fact, at a distance from one
paragraph up to the length of the document. So the loss of the answer rewards attention that keeps
the fact.

There are eight kinds of facts. Their sentences and names differ from those of
`dga_jax.evaluation.retrieval` and `dga_jax.evaluation.ruler`, so that an evaluation with these
modules measures recall and not memorized sentences.

A document depends on (text, seed, index) alone.
"""

import collections
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Fact(NamedTuple):
  """A fact.

  Attributes:
    told: the sentences that tell the fact, in the order of the text.
    question: asks for the answer.
    lead: begins the answer; "" where the answer stands alone.
    answer: words or numbers that `told` contains.
  """

  told: tuple[str, ...]
  question: str
  lead: str
  answer: str

  @property
  def asked(self) -> str:
    """The question and its answer, as a paragraph."""
    return f"{self.question} {self.lead}{' ' if self.lead else ''}{self.answer}."


_FIRST = (
  "Abigail Adam Agnes Albert Alice Ambrose Amelia Arthur Beatrice Benjamin Bertha Charles Clara "
  "Cyril Daniel Dora Edgar Edith Edmund Eleanor Ernest Esther Felix Flora Francis George Grace "
  "Harold Helen Henry Hugh Isabel Jasper Joan Julian Laura Leonard Lucy Mabel Martin Matilda "
  "Miles Nora Oliver Percy Philip Rachel Ralph Rupert Ruth Silas Simon Stella Sylvia Theodore "
  "Victor"
).split()
_LAST = (
  "Abbott Alden Ashby Atwood Barlow Bennett Birch Blake Brandon Calder Carver Chandler Cole "
  "Cramer Dalton Drake Eaton Ellery Fenwick Finch Foster Gale Garland Granger Hale Harding "
  "Hartley Hollis Ingram Jarvis Kendall Lacey Lambert Langley Marsh Mercer Norris Oakley Palmer "
  "Pemberton Prescott Quincy Radcliffe Rowland Sawyer Selby Sinclair Thorne Underwood Vaughan "
  "Wainwright Webb Winslow"
).split()
_TOWNS = (
  "Alderbury Ashcombe Barrowfield Beckton Brackenridge Burnham Calverley Clayford Coldwell "
  "Crowhurst Danbury Eastleigh Elmstead Farnworth Foxley Glenmore Greystone Halstead Hartfield "
  "Hollowdale Kingsmere Langport Littleton Marlow Merton Netherby Oldcastle Oxleigh Penrose "
  "Ravensworth Redcliff Rockford Saltmarsh Sherwood Stanmore Thornbury Upton Wakefield Westmoor "
  "Wexford"
).split()
_WARES = (
  "anvil barometer basket bonnet bridle carpet clock coat cradle desk fiddle globe harness kettle "
  "loom lute pistol plough saddle screen sextant shawl spade stove sword telescope trunk wagon "
  "wardrobe whip"
).split()
_TRADES = (
  "bookbinder brewer cobbler cooper draper fisherman glazier goldsmith groom hatter jeweller "
  "locksmith mason notary painter potter printer saddler schoolmaster shepherd surveyor tanner "
  "thatcher weaver wheelwright"
).split()
_INNS = (
  "Anchor Angel Bell Bull Crown Dolphin Eagle Falcon Fountain Greyhound Griffin Hart Lion Mermaid "
  "Pelican Phoenix Plough Raven Ship Star Sun Swan Talbot Unicorn Wheatsheaf"
).split()
_BUILDINGS = "bridge customs-house granary lighthouse observatory theatre town-hall viaduct".split()
_SOCIETIES = "committee council crew jury orchestra expedition".split()


def _person(rng: random.Random) -> str:
  return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


def _telephone(rng: random.Random) -> Fact:
  person, number = _person(rng), str(rng.randrange(1_000, 1_000_000))
  told = rng.choice(
    (
      f"Anybody who wished to speak to {person} had only to telephone to {number}.",
      f"On the card of {person} the telephone was printed as {number}.",
    )
  )
  question = rng.choice(
    (f"By which telephone could one reach {person}?", f"How does one telephone to {person}?")
  )
  return Fact((told,), question, rng.choice(("", f"One reaches {person} by telephone on")), number)


def _finished(rng: random.Random) -> Fact:
  building, town = rng.choice(_BUILDINGS), rng.choice(_TOWNS)
  year = str(rng.randrange(1500, 1950))
  told = rng.choice(
    (
      f"It was in {year} that they finished the {building} at {town}.",
      f"The {building} at {town} dates from {year}.",
    )
  )
  question = f"In which year was the {building} at {town} finished?"
  return Fact((told,), question, rng.choice(("", "They finished it in")), year)


def _price(rng: random.Random) -> Fact:
  seller, ware = rng.choice(_LAST), rng.choice(_WARES)
  price = f"{rng.randrange(2, 1000)} shillings"
  told = rng.choice(
    (
      f"At {seller}'s one had to pay {price} for the {ware}.",
      f"{seller} asked {price} for the {ware}, and would not take less.",
    )
  )
  question = f"How much did {seller} want for the {ware}?"
  return Fact((told,), question, rng.choice(("", f"{seller} wanted")), price)


def _coach(rng: random.Random) -> Fact:
  town, inn = rng.choice(_TOWNS), rng.choice(_INNS)
  told = rng.choice(
    (
      f"The coach for {town} departs from the {inn} every morning.",
      f"Travellers to {town} take their seats in the yard of the {inn}.",
    )
  )
  question = f"At which inn does the journey to {town} begin?"
  return Fact((told,), question, rng.choice(("At the", "It begins at the")), inn)


def _ticket(rng: random.Random) -> Fact:
  number, person = str(rng.randrange(100, 100_000)), _person(rng)
  told = rng.choice(
    (
      f"Ticket {number} in the lottery was bought by {person}.",
      f"It was {person} who drew ticket {number}.",
    )
  )
  return Fact((told,), f"Who had ticket {number}?", rng.choice(("", "It belonged to")), person)


def _trade(rng: random.Random) -> Fact:
  person, trade, town = _person(rng), rng.choice(_TRADES), rng.choice(_TOWNS)
  told = rng.choice(
    (
      f"{person}, as everybody in {town} knew, earned a living as a {trade}.",
      f"By trade {person} was a {trade}.",
    )
  )
  question = f"What was the trade of {person}?"
  return Fact((told,), question, rng.choice(("", f"{person} worked as a")), trade)


def _loan(rng: random.Random) -> Fact:
  """Two facts, both of which the answer needs."""
  ware = rng.choice(_WARES)
  owner, middle, last = (f"{first} {rng.choice(_LAST)}" for first in rng.sample(_FIRST, 3))
  told = (
    f"{owner} lent the old {ware} to {middle}.",
    f"A week later {middle} passed on to {last} what {owner} had lent.",
  )
  question = f"Who had the old {ware} of {owner} in the end?"
  return Fact(told, question, rng.choice(("", "In the end it was with")), last)


def _members(rng: random.Random) -> Fact:
  """A list, of which the answer repeats every entry."""
  society, town = rng.choice(_SOCIETIES), rng.choice(_TOWNS)
  names = rng.sample(_LAST, 3)
  listed = f"{names[0]}, {names[1]} and {names[2]}"
  told = rng.choice(
    (
      f"Three sat in the {society} of {town}: {listed}.",
      f"Into the {society} of {town} they elected {listed}.",
    )
  )
  question = f"Which three formed the {society} of {town}?"
  return Fact((told,), question, rng.choice(("", "They were")), listed)


FACTS: dict[str, Callable[[random.Random], Fact]] = {
  "telephone": _telephone,
  "finished": _finished,
  "price": _price,
  "coach": _coach,
  "ticket": _ticket,
  "trade": _trade,
  "loan": _loan,
  "members": _members,
}


def fact_documents(
  texts: Iterable[str], *, characters: int, facts: int, seed: int = 0
) -> Iterator[str]:
  """Documents of at most `characters` characters, in the order of the texts.

  A paragraph longer than half a document is left out, and so is the end of a text that does not
  fill a document.

  Args:
    texts: long texts, whose paragraphs are separated by blank lines.
    characters: of a document, facts and questions included.
    facts: told and asked for in a document.
    seed: of the facts and their positions.

  Raises:
    ValueError: the facts take more than half of a document.
  """
  index = 0
  for text in texts:
    stripped = map(str.strip, re.split(r"\n\s*\n", text))
    waiting = collections.deque(one for one in stripped if 0 < len(one) < characters // 2 - 1)
    while waiting:
      rng = random.Random(f"{seed} {index}")
      told = _distinct_facts(rng, facts)
      used = sum(len(part) + 2 for one in told for part in (*one.told, one.asked))
      if used > characters // 2:
        raise ValueError(
          f"facts is {facts}; they take {used} of characters={characters}, more than half. Give"
          " fewer facts or longer documents."
        )
      paragraphs: list[str] = []
      while waiting and used + len(waiting[0]) + 2 <= characters:
        used += len(waiting[0]) + 2
        paragraphs.append(waiting.popleft())
      if waiting:
        yield _hide(paragraphs, told, rng)
        index += 1


def _distinct_facts(rng: random.Random, count: int) -> list[Fact]:
  """Facts with different questions, so that every question has one answer."""
  facts: dict[str, Fact] = {}
  kinds = list(FACTS.values())
  while len(facts) < count:
    fact = rng.choice(kinds)(rng)
    facts.setdefault(fact.question, fact)
  return list(facts.values())


def _hide(paragraphs: list[str], facts: list[Fact], rng: random.Random) -> str:
  """Inserts every fact and, later, its question between paragraphs."""
  inserted: list[tuple[float, str]] = []
  for fact in facts:
    parts = (*fact.told, fact.asked)
    places = sorted(rng.random() for _ in parts)
    inserted += zip(places, parts, strict=True)
  pieces = [((place + 0.5) / len(paragraphs), text) for place, text in enumerate(paragraphs)]
  return "\n\n".join(text for _, text in sorted(pieces + inserted, key=lambda one: one[0]))
