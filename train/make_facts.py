r"""Makes a corpus in which facts are told and asked for later, from long texts.

  python -m train.make_facts --texts="books/*.txt" --output=facts.jsonl --documents=2000

A document has at most 28 000 characters by default, some 7000 tokens of English with a vocabulary
of 49 152 tokens, so that it fits a row of 8192 tokens. configs/smollm2_continued.py trains on such
a corpus.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from dga_jax.files.path_flags import define_path
from dga_jax.files.whole_file import whole_file
from train.data.facts import fact_documents
from train.data.files import find_files, read_documents
from train.flags import parse_flags

_TEXTS = flags.DEFINE_list("texts", None, "Texts to read: paths or glob patterns.", required=True)
_OUTPUT = define_path("output", "facts.jsonl", "File to write. It must not exist.")
_DOCUMENTS = flags.DEFINE_integer("documents", 2000, "Documents to write at most.", lower_bound=1)
_CHARACTERS = flags.DEFINE_integer("characters", 28_000, "Of a document at most.", lower_bound=1000)
_FACTS = flags.DEFINE_integer("facts", 40, "Facts of a document.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the facts and their positions.")


def main(argv: list[str]) -> None:
  """Writes the corpus by the flags."""
  del argv
  output = Path(_OUTPUT.value)
  if output.exists():
    sys.exit(f"error: --output is {output}, which exists. Name another file or delete it.")
  try:
    texts = _texts(tuple(_TEXTS.value))
    made = fact_documents(texts, characters=_CHARACTERS.value, facts=_FACTS.value, seed=_SEED.value)
    count = 0
    with whole_file(output) as partial, partial.open("w", encoding="utf-8") as file:
      for count, text in enumerate(itertools.islice(made, _DOCUMENTS.value), start=1):
        file.write(json.dumps({"id": f"facts {count}", "text": text}) + "\n")
      if not count:
        raise ValueError(f"no text has {_CHARACTERS.value} characters. Lower --characters.")
    print(f"{count} documents in {output}")
  except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")


def _texts(patterns: tuple[str, ...]) -> Iterator[str]:
  for path in find_files(patterns):
    yield from read_documents(path)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
