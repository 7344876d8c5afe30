"""The common part of the data sets built here: once, whole or not at all, without TensorFlow."""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from train.data.files import Split


class LocalBuilder(tfds.core.GeneratorBasedBuilder):
  """A data set in array_record files with the splits "train" and "validation", in given order.

  A subclass sets `feature`, and yields (index, {name: value}) from `_generate_examples(split)`.
  """

  VERSION = tfds.core.Version("1.0.0")
  # Where it would look for checksums of downloads, through a package that it does not install.
  code_path = None

  feature: ClassVar[dict[str, tfds.features.FeatureConnector]]

  def __init__(self, data_dir: str | os.PathLike[str]) -> None:
    super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(self.feature)
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: Any) -> dict[Split, Iterator[tuple[int, Any]]]:
    del dl_manager
    splits: tuple[Split, ...] = ("train", "validation")
    return {split: self._generate_examples(split) for split in splits}


def build[Builder: LocalBuilder](make_builder: Callable[[], Builder]) -> Builder:
  """Builds a data set unless it is there already, and returns its builder for reading.

  The builder writes to a folder of its own and renames that at the end, so a run that is killed
  or fails leaves nothing that would pass as the data set. When two runs build the same one, the
  second to finish reads what the first wrote.

  Args:
    make_builder: makes the builder; its `data_dir` has to change whenever its content would.

  Raises:
    OSError: the data set could not be written, for want of space or permission.
    ValueError: what the builder's own generators raise.
  """
  builder = make_builder()
  if _is_built(builder):
    return builder
  tfds.disable_progress_bar()
  try:
    # It announces a download of unknown size; there is none.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  except (OSError, RuntimeError) as error:  # array_record reports a full disk as RuntimeError.
    builder = make_builder()
    if not _is_built(builder):
      raise OSError(
        f"Could not write the data set to {builder.data_dir}: {error}. Free some space or set "
        "another data.cache_dir; nothing half-made was left."
      ) from error
  return builder


def _is_built(builder: LocalBuilder) -> bool:
  return pathlib.Path(builder.data_dir).exists()
