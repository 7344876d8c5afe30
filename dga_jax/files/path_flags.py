"""Flags that take paths; addresses that a flag does not support are refused while parsing."""

from absl import flags

from dga_jax.files.paths import check_path

flags.disclaim_key_flags()  # --help lists a flag with those of the module that defines it.


def define_path(
  name: str,
  default: str | None,
  help_text: str,
  *,
  required: bool = False,
  allow_gcs: bool = False,
) -> flags.FlagHolder:
  """Defines a flag for a path of the file system, or with `allow_gcs` also for gs://BUCKET/..."""
  return flags.DEFINE(_PathParser(name, allow_gcs), name, default, help_text, required=required)


def define_paths(name: str, help_text: str) -> flags.FlagHolder:
  """Defines a flag for a list of paths with commas between them, by default none."""
  serializer = flags.CsvListSerializer(",")
  return flags.DEFINE(_PathListParser(name), name, [], help_text, serializer=serializer)


class _PathParser(flags.ArgumentParser):
  """Parses a path."""

  def __init__(self, name: str, allow_gcs: bool) -> None:
    self._name = name
    self._allow_gcs = allow_gcs

  def parse(self, argument: str) -> str:
    check_path(f"--{self._name}", argument, allow_gcs=self._allow_gcs)
    return argument


class _PathListParser(flags.ListParser):
  """Parses paths with commas between them."""

  def __init__(self, name: str) -> None:
    super().__init__()
    self._name = name

  def parse(self, argument: str | list[str]) -> list[str]:
    paths: list[str] = super().parse(argument)
    for path in paths:
      check_path(f"--{self._name}", path)
    return paths
