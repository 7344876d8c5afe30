"""Base class of the data sets that are built here with tensorflow-datasets, without TensorFlow."""

import contextlib
import io
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from train.data.files import Split
from train.data.prepared import prepare


class PreparationError(OSError):
  """A data set could not be written."""


class _LocalInfo(tfds.core.DatasetInfo):
  """Information on a data set that exists on this machine alone."""

  def initialize_from_bucket(self) -> None:
    """Does not ask for a copy elsewhere; the original leaves a temporary folder behind."""


class LocalBuilder(tfds.core.GeneratorBasedBuilder):
  """A data set in array_record files with the splits "train" and "validation", in given order.

  A subclass sets `feature`, and yields (index, {name: value}) from `_generate_examples(split)`.
  """

  VERSION = tfds.core.Version("1.0.0")
  # There are no downloads, and so no checksums of them; looking for them needs another package.
  code_path = None

  feature: ClassVar[dict[str, tfds.features.FeatureConnector]]

  def __init__(self, data_dir: str | os.PathLike[str]) -> None:
    super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(self.feature)
    return _LocalInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: Any) -> dict[Split, Iterator[tuple[int, Any]]]:
    del dl_manager
    splits: tuple[Split, ...] = ("train", "validation")
    return {split: self._generate_examples(split) for split in splits}


def build[Builder: LocalBuilder](
  make_builder: Callable[[pathlib.Path], Builder],
  folder: pathlib.Path,
  *,
  repair: bool = False,
  check: Callable[[], None] = lambda: None,
) -> Builder:
  """Builds a data set unless it is there already, and returns its builder for reading.

  Args:
    make_builder: makes the builder for a data_dir.
    folder: the data_dir; it has to change whenever the content would.
    repair: build a damaged data set anew.
    check: called when everything is written; after its error nothing is kept.

  Raises:
    OSError: the data set is damaged, or could not be written, for want of space or permission.
    ValueError: what the builder's own generators or `check` raise.
  """

  def write(partial: pathlib.Path) -> None:
    tfds.disable_progress_bar()
    try:
      # It announces a download of unknown size; there is none.
      with contextlib.redirect_stdout(io.StringIO()):
        make_builder(partial).download_and_prepare()
    except PreparationError:  # Of another data set, which this one is made of.
      raise
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as RuntimeError.
      reason = str(error).rstrip(".")
      raise PreparationError(
        f"Could not write the data set to {folder}: {reason}. Free some space, or set another "
        "config.data.cache_dir. No part of the data set was left."
      ) from error
    check()
    shutil.rmtree(partial / "downloads", ignore_errors=True)

  prepare(folder, write, repair=repair)
  return make_builder(folder)
