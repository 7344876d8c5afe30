"""The files of a run beside its checkpoints: metrics, plots, profiles, batches of bad steps."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from dga_jax.files.paths import is_gcs
from dga_jax.files.storage import AnyPath, files_below
from train.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """The folder of a run, as one of its processes writes to it.

  An object store cannot append to a file. For a run in one, a process writes its files to a
  temporary folder of its host, and `publish` copies them to the run's folder.

  Attributes:
    root: the run's folder, the trainer's --workdir.
    local: the folder that this process writes to; `root` unless `root` is in an object store.
  """

  root: AnyPath
  local: Path
  _published: dict[Path, tuple[int, int]] = dataclasses.field(default_factory=dict)

  def path_in_root(self, path: Path) -> AnyPath:
    """The path in the run's folder of a file in `local`."""
    return self.root / path.relative_to(self.local)

  def fetch(self, name: str) -> None:
    """Copies a file of the run's folder to `local`, if it exists."""
    if self.root != self.local and (self.root / name).exists():
      (self.local / name).write_bytes((self.root / name).read_bytes())

  def publish(self) -> None:
    """Copies the files that have changed since the last call to the run's folder.

    Raises:
      TrainingError: a file could not be written there.
    """
    if self.root == self.local:
      return
    for path in sorted(files_below(self.local)):
      state = (path.stat().st_mtime_ns, path.stat().st_size)
      if self._published.get(path) == state:
        continue
      target = self.path_in_root(path)
      try:
        target.write_bytes(path.read_bytes())
      except Exception as error:  # The library of the store raises errors of many kinds.
        raise TrainingError(f"{target} could not be written: {error!r}") from error
      self._published[path] = state


@contextlib.contextmanager
def open_run_folder(workdir: AnyPath, fetched: str | None) -> Iterator[RunFolder]:
  """The files of a run in `workdir`; they are published at the end, after an error too.

  Args:
    workdir: the run's folder.
    fetched: name of the file that this process continues to write.
  """
  if not is_gcs(workdir):
    assert isinstance(workdir, Path)
    yield RunFolder(workdir, workdir)
    return
  with tempfile.TemporaryDirectory(prefix="dga-run-") as local:
    files = RunFolder(workdir, Path(local))
    if fetched is not None:
      files.fetch(fetched)
    try:
      yield files
    except BaseException:
      try:
        files.publish()
      except TrainingError as error:
        logging.error("%s", error)
      raise
    files.publish()
