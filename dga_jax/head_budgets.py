"""Budgets of KV heads: which setting of attention each KV head of each layer follows."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from dga_jax.choices import CacheDtypeName
from dga_jax.config import DGAConfig
from dga_jax.config_dataclasses import config_error, from_dict, require_choice, require_int
from dga_jax.files.whole_file import whole_file

__all__ = [
  "FULL",
  "HeadBudgets",
  "HeadRow",
  "HeadSetting",
  "SinkWindow",
  "read_calibrated",
  "read_head_budgets",
  "split_row",
  "write_head_budgets",
]

FULL: Literal["full"] = "full"  # Causal dense attention, with a cache of every token.
MAX_SETTINGS = 4


@dataclasses.dataclass(frozen=True)
class SinkWindow:
  """Attention sinks and a sliding window, without merged groups or focal tokens.

  A query sees the first `sinks` tokens of its document and the last `window` of the other tokens.
  Keys keep their RoPE positions. The cache holds sinks + window tokens. This is the rule of the
  heads of DuoAttention that are not full (Xiao et al., arXiv 2410.10819).

  Attributes:
    window: last tokens that a query sees, its own token included; at least 1.
    sinks: first tokens that every query sees.

  Raises:
    ValueError: names the field, its value and the values it takes.
  """

  window: int
  sinks: int = 4

  def __post_init__(self) -> None:
    require_int(self, "window", least=1)
    require_int(self, "sinks", least=0)


type HeadSetting = Literal["full"] | DGAConfig | SinkWindow
type HeadRow = tuple[int, ...]  # The setting of each KV head of a layer, as an index.


@dataclasses.dataclass(frozen=True)
class HeadBudgets:
  """One setting of attention for each KV head of each layer. Query heads follow their KV head.

  The settings of a model cost programs and launches: every distinct setting of a layer is one more
  attention call. So there are at most four.

  Attributes:
    settings: distinct settings: "full" for causal dense attention, a causal `DGAConfig` with
      streaming selection, or a `SinkWindow`.
    assignment: [layers][kv_heads], an index into `settings`.
    cache_dtype: the dtype in which full heads and sink windows store the keys and values of their
      tokens; None for the dtype that the model computes in. 8 bits halve these caches of a 16-bit
      model. Each key and each value is rounded when it enters the cache and has one scale. A token
      that is decoded, or appended by `extend`, attends to the rounded tokens, itself included;
      attention over whole sequences, the prompt of a prefill included, reads exact ones. A
      `DGAConfig` has a `cache_dtype` of its own.

  Raises:
    ValueError: names the field, its value and the values it takes.
  """

  settings: tuple[HeadSetting, ...]
  assignment: tuple[HeadRow, ...]
  cache_dtype: CacheDtypeName | None = None

  def __post_init__(self) -> None:
    require_choice(self, "cache_dtype", CacheDtypeName, optional=True)
    if not isinstance(self.settings, list | tuple):
      raise config_error(self, "settings", "a list of settings")
    settings = tuple(
      _read_setting(setting, path=f"HeadBudgets.settings[{index}]")
      for index, setting in enumerate(self.settings)
    )
    object.__setattr__(self, "settings", settings)
    valid = all(
      setting == FULL
      or isinstance(setting, SinkWindow)
      or (isinstance(setting, DGAConfig) and setting.selection == "streaming" and setting.causal)
      for setting in settings
    )
    if not valid or not 1 <= len(settings) <= MAX_SETTINGS or len(set(settings)) != len(settings):
      raise config_error(
        self,
        "settings",
        f"1 to {MAX_SETTINGS} distinct settings, each 'full', a SinkWindow, or a DGAConfig with "
        "selection='streaming' and causal=True",
      )
    try:
      rows = tuple(tuple(map(_index, row)) for row in self.assignment)
    except TypeError:
      rows = ()
    object.__setattr__(self, "assignment", rows or self.assignment)
    widths = {len(row) for row in rows}
    used = {index for row in rows for index in row}
    if len(widths) != 1 or 0 in widths or not used <= set(range(len(settings))):
      raise config_error(
        self,
        "assignment",
        "layers of equally many KV heads, each an index into settings from 0 to "
        f"{len(settings) - 1}",
      )

  @property
  def num_layers(self) -> int:
    """Layers of the assignment."""
    return len(self.assignment)

  @property
  def num_kv_heads(self) -> int:
    """N, KV heads of each layer."""
    return len(self.assignment[0])

  def layer(self, index: int) -> "HeadBudgets":
    """The budgets of one layer, as budgets of one layer; the settings stay."""
    return dataclasses.replace(self, assignment=(self.assignment[index],))

  def setting(self, layer: int, kv_head: int) -> HeadSetting:
    """The setting of one KV head."""
    return self.settings[self.assignment[layer][kv_head]]

  def counts(self) -> dict[HeadSetting, int]:
    """KV heads of all layers that follow each setting, without settings that none follows."""
    used = [head for row in self.assignment for head in row]
    return {
      setting: used.count(index) for index, setting in enumerate(self.settings) if index in used
    }

  def contiguous_order(self, parts: int = 1) -> tuple[tuple[int, ...], ...]:
    """For each layer the order of its KV heads in which the heads of every setting are adjacent.

    Heads stay where they are in a layer whose settings are in that order already.

    Args:
      parts: devices over which tensor parallelism splits the heads. Each part of the order gets
        its share of every setting, so that the devices have equal work. Where a setting has a
        remainder, some parts have one head more of it than others, and all devices wait for them.

    Returns:
      [layers][kv_heads], for `permute_kv_heads`.

    Raises:
      ValueError: parts does not divide the KV heads.
    """
    if parts < 1 or self.num_kv_heads % parts:
      raise ValueError(
        f"parts is {parts}; it must divide the {self.num_kv_heads} KV heads of a layer. Split "
        "heads over fewer devices."
      )

    def order(row: HeadRow) -> tuple[int, ...]:
      by_setting = sorted(range(len(row)), key=lambda head: row[head])
      dealt = tuple(head for part in range(parts) for head in by_setting[part::parts])
      is_in_order = tuple(row[head] for head in dealt) == row
      return tuple(range(len(row))) if is_in_order else dealt

    return tuple(map(order, self.assignment))

  def arranged(self, parts: int = 1) -> "HeadBudgets":
    """The budgets of the same model with its KV heads in `contiguous_order(parts)`."""
    return self.permute_kv_heads(self.contiguous_order(parts))

  def has_equal_parts(self, parts: int) -> bool:
    """Whether `parts` divides the heads of every setting in every layer.

    Devices that split the heads in `contiguous_order(parts)` then have equal settings.
    """
    return all(row.count(index) % parts == 0 for row in self.assignment for index in set(row))

  def permute_kv_heads(self, order: Sequence[Sequence[int]]) -> "HeadBudgets":
    """The budgets of the same model with its KV heads in another order.

    Args:
      order: [layers][kv_heads], the present head at each place of the new order.
    """
    rows = zip(self.assignment, order, strict=True)
    permuted = tuple(tuple(row[head] for head in new) for row, new in rows)
    return dataclasses.replace(self, assignment=permuted)

  def with_cache_dtype(self, cache_dtype: CacheDtypeName | None) -> "HeadBudgets":
    """The budgets with one `cache_dtype` for all heads, those that follow a `DGAConfig` included.

    Settings that differ in `cache_dtype` alone become one.
    """
    settings = [
      dataclasses.replace(one, cache_dtype=cache_dtype) if isinstance(one, DGAConfig) else one
      for one in self.settings
    ]
    distinct = tuple(dict.fromkeys(settings))
    rows = tuple(tuple(distinct.index(settings[index]) for index in row) for row in self.assignment)
    return HeadBudgets(distinct, rows, cache_dtype)

  def to_dict(self) -> dict[str, Any]:
    """The budgets as plain values that JSON can store; `cache_dtype` None is left out."""
    return {
      "settings": [s if s == FULL else dataclasses.asdict(s) for s in self.settings],
      "assignment": [list(row) for row in self.assignment],
      **({} if self.cache_dtype is None else {"cache_dtype": self.cache_dtype}),
    }

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], *, path: str = "budgets") -> Self:
    """The inverse of `to_dict`.

    Args:
      values: "settings", "assignment" and, if it is not None, "cache_dtype"; a setting is "full" or
        a mapping of the fields of DGAConfig or of SinkWindow, which alone has the field "window".
      path: the name of `values` in messages.

    Raises:
      ValueError: an unknown or a missing key, or a wrong value.
    """
    keys = {"settings", "assignment"}
    if not isinstance(values, Mapping) or set(values) - {"cache_dtype"} != keys:
      raise ValueError(
        f"{path} is {values!r:.200}; it must be a mapping with the keys 'settings' and "
        "'assignment', and optionally 'cache_dtype'."
      )
    return cls(values["settings"], values["assignment"], values.get("cache_dtype"))

  def to_json(self) -> str:
    """The text of `to_dict` as JSON."""
    return json.dumps(self.to_dict(), indent=1)


def read_head_budgets(path: str | Path) -> HeadBudgets:
  """The budgets in a JSON file of `dga calibrate` or of `HeadBudgets.to_json`.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not JSON, or its content is not that of budgets; the message names the file.
  """
  return read_calibrated(path)[0]


def read_calibrated(path: str | Path) -> tuple[HeadBudgets, dict[str, Any]]:
  """The budgets in a file, and how they were found, see `write_head_budgets`.

  Raises:
    OSError: as for `read_head_budgets`, as is ValueError.
  """
  try:
    values = json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  calibration = values.pop("calibration", None) if isinstance(values, dict) else None
  if not isinstance(calibration, dict | None):
    raise ValueError(f"{path} has calibration={calibration!r:.80}; it must be an object.")
  return HeadBudgets.from_dict(values, path=str(path)), calibration or {}


def write_head_budgets(
  budgets: HeadBudgets, calibration: Mapping[str, Any], path: str | Path
) -> None:
  """Writes a file for `read_head_budgets`, which appears when it is complete.

  Args:
    budgets: of the model.
    calibration: how the budgets were found: JSON values without NaN.
    path: of the file; its folder is made.
  """
  values = budgets.to_dict() | {"calibration": calibration}
  with whole_file(path) as partial:
    partial.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")


def split_row(row: HeadRow, parts: int) -> tuple[HeadRow, ...]:
  """A row in `parts` parts of equally many adjacent KV heads."""
  size = len(row) // parts
  return tuple(row[start : start + size] for start in range(0, len(row), size))


def _read_setting(setting: Any, path: str) -> Any:
  """A setting whose fields may be a mapping, as JSON has them."""
  if not isinstance(setting, Mapping):
    return setting
  cls: type[DGAConfig] | type[SinkWindow] = SinkWindow if "window" in setting else DGAConfig
  return from_dict(cls, setting, path=path)


def _index(value: Any) -> int:
  if isinstance(value, bool) or not hasattr(value, "__index__"):
    raise TypeError(f"{value!r} is no index")
  return value.__index__()
