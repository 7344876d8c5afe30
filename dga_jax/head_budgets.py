"""Budgets of KV heads: which setting of attention each KV head of each layer follows."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from dga_jax.config import DGAConfig
from dga_jax.config_dataclasses import config_error, from_dict

__all__ = ["FULL", "HeadBudgets", "HeadSetting"]

FULL: Literal["full"] = "full"  # Causal dense attention, with a cache of every token.
MAX_SETTINGS = 4

type HeadSetting = Literal["full"] | DGAConfig


@dataclasses.dataclass(frozen=True)
class HeadBudgets:
  """One setting of attention for each KV head of each layer. Query heads follow their KV head.

  The settings of a model cost programs and launches: every distinct setting of a layer is one more
  attention call. So there are at most four.

  Attributes:
    settings: distinct settings: "full" for causal dense attention, or a `DGAConfig` with streaming
      selection.
    assignment: [layers][kv_heads], an index into `settings`.

  Raises:
    ValueError: names the field, its value and the values it takes.
  """

  settings: tuple[HeadSetting, ...]
  assignment: tuple[tuple[int, ...], ...]

  def __post_init__(self) -> None:
    settings = tuple(self.settings)
    object.__setattr__(self, "settings", settings)
    valid = all(
      setting == FULL or (isinstance(setting, DGAConfig) and setting.selection == "streaming")
      for setting in settings
    )
    if not valid or not 1 <= len(settings) <= MAX_SETTINGS or len(set(settings)) != len(settings):
      raise config_error(
        self,
        "settings",
        f"1 to {MAX_SETTINGS} distinct settings, each 'full' or a DGAConfig with "
        "selection='streaming'",
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
    return HeadBudgets(self.settings, (self.assignment[index],))

  def setting(self, layer: int, kv_head: int) -> HeadSetting:
    """The setting of one KV head."""
    return self.settings[self.assignment[layer][kv_head]]

  def to_dict(self) -> dict[str, Any]:
    """The budgets as plain values that JSON can store."""
    return {
      "settings": [s if s == FULL else dataclasses.asdict(s) for s in self.settings],
      "assignment": [list(row) for row in self.assignment],
    }

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], *, path: str = "budgets") -> Self:
    """The inverse of `to_dict`.

    Args:
      values: "settings" and "assignment"; a setting is "full" or a mapping of DGAConfig's fields.
      path: the name of `values` in messages.

    Raises:
      ValueError: an unknown or a missing key, or a wrong value.
    """
    if not isinstance(values, Mapping) or set(values) != {"settings", "assignment"}:
      raise ValueError(
        f"{path} is {values!r:.200}; it must be a mapping with the keys 'settings' and "
        "'assignment'."
      )
    if not isinstance(values["settings"], list | tuple):
      raise ValueError(f"{path}.settings is {values['settings']!r:.200}; it must be a list.")
    settings = tuple(
      from_dict(DGAConfig, setting, path=f"{path}.settings[{index}]")
      if isinstance(setting, Mapping)
      else setting
      for index, setting in enumerate(values["settings"])
    )
    return cls(settings, values["assignment"])

  def to_json(self) -> str:
    """The text of `to_dict` as JSON."""
    return json.dumps(self.to_dict(), indent=1)


def _index(value: Any) -> int:
  if isinstance(value, bool) or not hasattr(value, "__index__"):
    raise TypeError(f"{value!r} is no index")
  return value.__index__()
