"""Settings of the attention kinds that Dynamic Group Attention is compared with.

Each default is its paper's setting. `with_budget` gives the same kind a cache of a wanted number of
tokens for each sequence, layer and head, so that kinds are compared at equal memory.
"""

import dataclasses
from typing import Any, ClassVar, Self


class _Settings:
  """Checks that every field is a whole number, at least what `_LEAST` says (or 0), or a bool."""

  _LEAST: ClassVar[dict[str, int]] = {}

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      value, least = getattr(self, field.name), self._LEAST.get(field.name, 0)
      if isinstance(field.default, bool):
        if not isinstance(value, bool):
          raise ValueError(f"{type(self).__name__}.{field.name} is {value!r}; it must be a bool.")
      elif not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
          f"{type(self).__name__}.{field.name} is {value!r}; it must be an integer of at least"
          f" {least}."
        )

  def _replace(self, keys: int, least: int, **changes: Any) -> Self:
    if keys < least:
      raise ValueError(
        f"keys is {keys}; a cache of {type(self).__name__} needs at least {least} tokens."
      )
    return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True)
class SlidingWindowConfig(_Settings):
  """Each query sees the last `window` tokens, its own among them (Mistral 7B, arXiv 2310.06825)."""

  window: int = 4096

  _LEAST: ClassVar = {"window": 1}

  def with_budget(self, keys: int) -> Self:
    """A window of `keys` tokens."""
    return self._replace(keys, 1, window=keys)


@dataclasses.dataclass(frozen=True)
class StreamingLLMConfig(_Settings):
  """StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window.

  Attributes:
    sinks: the first tokens, which stay.
    window: the last tokens, the query's own among them. Positions count within the cache.
  """

  sinks: int = 4
  window: int = 2000

  _LEAST: ClassVar = {"window": 1}

  def with_budget(self, keys: int) -> Self:
    """The same sinks, and a window that makes `keys` tokens with them."""
    return self._replace(keys, self.sinks + 1, window=keys - self.sinks)


@dataclasses.dataclass(frozen=True)
class LMInfiniteConfig(_Settings):
  """LM-Infinite (Han et al., arXiv 2308.16137): a Λ-shaped mask and a bound on distances.

  Attributes:
    global_tokens: the first tokens, which stay.
    local_window: the last tokens, the query's own among them, and the largest distance that
      enters RoPE: global tokens farther away are treated as if they stood there.
  """

  global_tokens: int = 10
  local_window: int = 4096

  _LEAST: ClassVar = {"local_window": 1}

  def with_budget(self, keys: int) -> Self:
    """The same global tokens, and a local window that makes `keys` tokens with them."""
    return self._replace(keys, self.global_tokens + 1, local_window=keys - self.global_tokens)


@dataclasses.dataclass(frozen=True)
class MInferenceConfig(_Settings):
  """MInference (Jiang et al., arXiv 2407.02490), its vertical-slash pattern for every head.

  It spares work in the prompt alone: the cache is dense, and so is decoding. The paper searches
  sizes for each head of a model; the defaults are those that its code takes without a search.

  Attributes:
    vertical: keys that all queries see, by head.
    slash: distances between query and key that all queries see, by head.
    last_queries: how many of the last queries choose both.
    first_tokens: keys that are always among the vertical ones.
    recent_distances: distances from 0 on that are always among the slashes.
  """

  vertical: int = 1000
  slash: int = 6096
  last_queries: int = 64
  first_tokens: int = 30
  recent_distances: int = 100

  _LEAST: ClassVar = {"vertical": 1, "slash": 1, "last_queries": 1, "recent_distances": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, whole in (("first_tokens", "vertical"), ("recent_distances", "slash")):
      if getattr(self, name) > getattr(self, whole):
        raise ValueError(
          f"MInferenceConfig.{name} is {getattr(self, name)}; it must be at most"
          f" {whole}={getattr(self, whole)}, which it is part of."
        )

  def with_budget(self, keys: int) -> Self:
    """Vertical and slash sizes of `keys` together, in the same ratio; bounds what is attended.

    The cache stays dense.
    """
    vertical = max(1, round(keys * self.vertical / (self.vertical + self.slash)))
    slash = keys - vertical
    first, recent = min(self.first_tokens, vertical), min(self.recent_distances, slash)
    changes = {"first_tokens": first, "recent_distances": recent}
    return self._replace(keys, 2, vertical=vertical, slash=slash, **changes)


@dataclasses.dataclass(frozen=True)
class TopKEvictionConfig(_Settings):
  """Heavy hitters and recent tokens (H2O, Zhang et al., arXiv 2306.14048).

  Attributes:
    heavy: tokens kept for the attention that they have received.
    recent: the last tokens, kept in any case.
    interval: tokens that are read between two evictions; the cache holds heavy + recent +
      interval. The paper evicts after each token (1); a longer interval keeps more and is read
      in blocks. The defaults keep 10 % and 10 % of 4096 tokens, the paper's budget.
    dense_prompt: False evicts from the first token on: causal, and the cache is small throughout.
      True reads a prompt with dense attention and evicts once at its end, when all queries of the
      prompt have voted; whole sequences are then dense, and decoding is another function.
  """

  heavy: int = 410
  recent: int = 410
  interval: int = 64
  dense_prompt: bool = False

  _LEAST: ClassVar = {"interval": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.heavy + self.recent < 1:
      raise ValueError("TopKEvictionConfig.heavy + recent is 0; it must be at least 1.")

  @property
  def entries(self) -> int:
    """What an eviction leaves."""
    return self.heavy + self.recent

  def with_budget(self, keys: int) -> Self:
    """Half for heavy hitters and half for recent tokens, after the interval (at most an eighth)."""
    interval = max(1, min(self.interval, keys // 8))
    heavy = (keys - interval) // 2
    changes = {"heavy": heavy, "recent": keys - interval - heavy, "interval": interval}
    return self._replace(keys, 2, **changes)


@dataclasses.dataclass(frozen=True)
class KVMergerConfig(_Settings):
  """Merging of adjacent similar keys (after KVMerger, Wang et al., arXiv 2407.08454).

  Attributes:
    budget: tokens and merged runs that are kept.
    heavy: how many of them stay unmerged for the attention that they have received.
    recent: the last tokens, which stay unmerged.
    interval: tokens that are read between two mergings; the cache holds budget + interval. The
      default budget is half of 4096 tokens, the paper's larger one.
    dense_prompt: as for TopKEvictionConfig.
  """

  budget: int = 2048
  heavy: int = 245
  recent: int = 512
  interval: int = 64
  dense_prompt: bool = False

  _LEAST: ClassVar = {"budget": 2, "interval": 1}

  def __post_init__(self) -> None:
    super().__post_init__()
    # Each heavy token takes two of the links between neighbours; `interval` must be left.
    least = 2 * self.heavy + self.recent + 1
    if self.budget < least:
      raise ValueError(
        f"KVMergerConfig.budget is {self.budget}; it must be at least 2·heavy + recent + 1 ="
        f" {least}, so that enough neighbours can merge."
      )

  @property
  def entries(self) -> int:
    """What a merging leaves."""
    return self.budget

  def with_budget(self, keys: int) -> Self:
    """`keys` less the interval (at most an eighth); heavy and recent tokens in proportion."""
    interval = max(1, min(self.interval, keys // 8))
    budget = keys - interval
    heavy, recent = (int(share * budget / self.budget) for share in (self.heavy, self.recent))
    changes = {"budget": budget, "heavy": heavy, "recent": recent, "interval": interval}
    return self._replace(keys, 3, **changes)
