"""Local files as a tensorflow-datasets data set, one example per document."""

import os
import pathlib
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds
from tqdm import tqdm

from train.data.files import Corpus, Split
from train.data.tfds_builder import build, LocalBuilder

# While it writes a split, tensorflow-datasets holds up to 1000 MiB in memory; for more it imports
# TensorFlow.
_MAX_SPLIT_BYTES = 950 << 20


class LocalText(LocalBuilder):
  """The documents of a corpus, with one feature, `text`."""

  feature: ClassVar = {"text": tfds.features.Text()}

  def __init__(self, corpus: Corpus, data_dir: str | os.PathLike[str]) -> None:
    self._corpus = corpus
    super().__init__(data_dir)

  def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, str]]]:
    size = count = 0
    documents = self._corpus.documents(split)
    for document in tqdm(documents, f"Reading {split} documents", unit=" documents", disable=None):
      size += len(document.encode())
      if size > _MAX_SPLIT_BYTES:
        raise ValueError(
          f"The {split} files hold more than {_MAX_SPLIT_BYTES >> 20} MiB of text, the most that "
          "one split can be made of. Name fewer files."
        )
      yield count, {"text": document}
      count += 1
    if not count:
      raise ValueError(_EMPTY[split])


_EMPTY: dict[Split, str] = {
  "train": "train_files hold no text: every document is blank or held out. Name other files.",
  "validation": (
    "There is no held-out text: validation_files are blank, or train_files have too few documents "
    "to hold some of them out. Name text in validation_files."
  ),
}


def build_local_text(
  corpus: Corpus, folder: pathlib.Path, fingerprint: str, *, repair: bool = False
) -> LocalText:
  """The documents of a corpus as a data set in a folder.

  Read it with `.as_data_source(split)`, whose examples hold `text` as UTF-8 bytes.

  Args:
    corpus: the files.
    folder: of the data set; its path has the fingerprint.
    fingerprint: of the corpus.
    repair: build a damaged data set anew.

  Raises:
    OSError: the data set is damaged (unless `repair`), or could not be written.
    ValueError: a file that cannot be read as text, or that changes meanwhile, or a split without
      text.
  """
  return build(
    lambda data_dir: LocalText(corpus, data_dir),
    folder,
    repair=repair,
    check=lambda: corpus.check_unchanged(fingerprint),
  )
