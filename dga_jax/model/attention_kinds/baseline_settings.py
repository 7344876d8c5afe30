"""Base class of the baselines' settings."""

import dataclasses
from typing import Any, ClassVar, Self

from dga_jax.config_dataclasses import require_int, require_number, require_type


class BaselineSettings:
  """Settings of an attention kind that Dynamic Group Attention is compared with.

  Subclasses are frozen dataclasses of ints, bools and floats whose defaults are their paper's, with
  a method `with_budget(keys)`: the same kind with a cache of `keys` tokens for each sequence, layer
  and head, so that kinds are compared at equal memory. Kinds that store all tokens read `keys`
  tokens in a decoding step instead.
  """

  # Least value of an int field; 0 where a field is absent.
  _LEAST: ClassVar[dict[str, int]] = {}

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      if isinstance(field.default, bool):
        require_type(self, field.name, bool)
      elif isinstance(field.default, float):
        require_number(self, field.name, least=0)
      else:
        require_int(self, field.name, least=self._LEAST.get(field.name, 0))

  def with_budget(self, keys: int) -> Self:
    """These settings, changed to keep `keys` tokens.

    Raises:
      ValueError: the kind needs more tokens.
    """
    raise NotImplementedError(f"{type(self).__name__} does not define with_budget.")

  def _with_budget(self, keys: int, least: int, **changes: Any) -> Self:
    if keys < least:
      raise ValueError(
        f"keys is {keys}; the cache of {type(self).__name__} needs at least {least} tokens."
      )
    return dataclasses.replace(self, **changes)  # type: ignore[type-var]
