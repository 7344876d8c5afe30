"""Inputs of the attention kernel tests, with all kinds of ranges, and the comparison."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels.grouped_attention import HeadOrder, KVSource, KVSources
from pallas_kernels.grouped_attention.reference import grouped_attention_reference
from pallas_kernels.grouped_attention.xla import grouped_attention_xla
from tests.rounding import assert_close


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of one call of `grouped_attention`.

  Attributes:
    documents: lengths of the documents of each row. The rest of the row is padding.
    length: tokens of a row.
    query_heads: H.
    kv_heads: N.
    head_dim: D.
    group_size: m.
    focal_rate: probability that a token is focal, under global selection.
    streaming: whether the ranges are those of streaming selection.
    bidirectional: whether the ranges are those of bidirectional attention.
    shared_bounds: whether all KV heads share one array of bounds.
    group_bias: bias of the logits of groups.
    dtype: dtype of query, keys and values.
    without_groups: whether the group source has no keys, as for sinks with a window.
    full_heads: the first KV heads, which see all earlier tokens of their document as the window.
      With them, the last KV head sees no keys.
    blind_heads: the first KV heads, which see no keys.
  """

  documents: tuple[tuple[int, ...], ...]
  length: int
  query_heads: int = 2
  kv_heads: int = 1
  head_dim: int = 64
  group_size: int = 4
  focal_rate: float = 0.25
  streaming: bool = False
  bidirectional: bool = False
  shared_bounds: bool = False
  group_bias: float = 0.0
  dtype: str = "float32"
  without_groups: bool = False
  full_heads: int = 0
  blind_heads: int = 0

  def inputs(self, seed: int = 0) -> tuple[jax.Array, KVSources, dict[str, Any]]:
    """The arguments of `grouped_attention`."""
    rng = np.random.default_rng(seed)
    bound_heads = 1 if self.shared_bounds else self.kv_heads
    make = self._streaming_row if self.streaming else self._sorted_row
    make = self._bidirectional_row if self.bidirectional else make
    fields_BxnxFxL = np.stack(
      [
        np.stack([self._row_of_head(n, make)(rng, row) for n in range(bound_heads)])
        for row in self.documents
      ]
    )
    B, D = len(self.documents), self.head_dim

    def draw(*shape: int) -> jax.Array:
      return jnp.asarray(rng.normal(size=shape), self.dtype)

    query = draw(B, self.length, self.query_heads, D)
    ranges = jnp.asarray(np.moveaxis(fields_BxnxFxL, 2, 0), jnp.int32)
    sources = []
    for start, end in zip(ranges[::2], ranges[1::2], strict=True):
      # Each source has three more entries than any query sees.
      shape = (B, int(end.max()) + 3, self.kv_heads, D)
      sources.append(KVSource(draw(*shape), draw(*shape), start, end))
    if self.without_groups:
      none = jnp.zeros_like(sources[1].start)
      sources[1] = KVSource(sources[1].key[:, :0], sources[1].value[:, :0], none, none)
    block = self.group_size + 1 if self.streaming else self.group_size
    block = 2 * block if self.bidirectional else block
    options = {"scale": D**-0.5, "group_bias": self.group_bias, "max_window": block}
    if self.full_heads:
      full, others = (0, self.full_heads), (self.full_heads, self.kv_heads - self.full_heads)
      order = HeadOrder(keys=(full, others), entries=(others, full))
      options |= {"max_window": self.length, "head_order": order}
    return query, KVSources(*sources), options

  def _sorted_row(self, rng: np.random.Generator, documents: tuple[int, ...]) -> np.ndarray:
    """Ranges of global selection: prefixes of focal tokens and groups, a window of raw tokens."""
    m = self.group_size
    base = np.zeros(3, int)
    columns = []
    for length in documents:
      focal = rng.random(length) < self.focal_rate
      seen_f = np.cumsum(focal)
      seen_c = np.cumsum(~focal)
      groups = seen_c // m
      zero = np.zeros(length, int)
      row = np.stack([zero, seen_f, zero, groups, groups * m, seen_c])
      columns.append(row + np.repeat(base, 2)[:, None])
      base += [seen_f[-1], groups[-1], seen_c[-1]]
    return self._pad(columns, base)

  def _bidirectional_row(self, rng: np.random.Generator, documents: tuple[int, ...]) -> np.ndarray:
    """Ranges of bidirectional attention: all focal tokens, groups of a list that repeats them."""
    m = self.group_size
    base = np.zeros(3, int)
    columns = []
    for length in documents:
      focal = rng.random(length) < self.focal_rate
      focal[np.flatnonzero(~focal)[(~focal).sum() // m * m :]] = True
      upto = np.cumsum(~focal)
      first, last = (upto - ~focal) // m, -(-upto // m)  # The own group of a query.
      zero, groups = np.zeros(length, int), upto[-1] // m
      row = np.stack([zero, zero + focal.sum(), last, groups + first, first * m, last * m])
      columns.append(row + np.repeat(base, 2)[:, None])
      base += [focal.sum(), 2 * groups, groups * m]
    return self._pad(columns, base)

  def _streaming_row(self, rng: np.random.Generator, documents: tuple[int, ...]) -> np.ndarray:
    """Ranges of streaming selection with one focal token and one group per complete block."""
    del rng
    block = self.group_size + 1
    base = np.zeros(3, int)
    columns = []
    for length in documents:
      i = np.arange(length)
      zero = np.zeros(length, int)
      row = np.stack([zero, i // block, zero, i // block, i // block * block, i + 1])
      columns.append(row + np.repeat(base, 2)[:, None])
      base += [length // block, length // block, length]
    return self._pad(columns, base)

  def _row_of_head(self, head: int, make: Any) -> Any:
    """The function that makes the ranges of a head, which is `make` for most heads."""
    if head < self.full_heads:
      return self._full_row
    if head < self.blind_heads or (self.full_heads and head == self.kv_heads - 1):
      return self._blind_row
    return make

  def _blind_row(self, rng: np.random.Generator, documents: tuple[int, ...]) -> np.ndarray:
    """Ranges of queries that see no keys."""
    del rng, documents
    return np.zeros((6, self.length), int)

  def _full_row(self, rng: np.random.Generator, documents: tuple[int, ...]) -> np.ndarray:
    """Ranges of causal dense attention inside each document."""
    del rng
    zero, base = np.zeros(self.length, int), 0
    columns = [np.zeros((6, 0), int)]
    for length in documents:
      i = base + np.arange(length)
      columns.append(np.stack([*[zero[:length]] * 4, zero[:length] + base, i + 1]))
      base += length
    return self._pad(columns, np.array([0, 0, base]))

  def _pad(self, columns: list[np.ndarray], base: np.ndarray) -> np.ndarray:
    """Adds the ranges of padding, which are empty and at the end of each source."""
    used = sum(c.shape[1] for c in columns)
    empty = np.repeat(np.repeat(base, 2)[:, None], self.length - used, axis=1)
    return np.concatenate([*columns, empty], axis=1)


CASES = {
  "plain": Case(documents=((100,),), length=100),
  "exact_tiles": Case(documents=((128,),), length=128, query_heads=4, kv_heads=2),
  "ragged": Case(documents=((97,), (5,)), length=97, query_heads=4, kv_heads=1),
  "packed": Case(
    documents=((40, 33, 1, 20), (90,)), length=100, query_heads=8, kv_heads=1, group_size=3
  ),
  "fully_masked_row": Case(documents=((), (70,)), length=70),
  "all_focal": Case(documents=((70,),), length=70, focal_rate=1.0),
  "full_tiles": Case(documents=((270,),), length=270, focal_rate=1.0),
  "no_focal": Case(documents=((70,),), length=70, focal_rate=0.0),
  "bias": Case(documents=((90,),), length=90, group_bias=1.4),
  "streaming": Case(documents=((100,), (61,)), length=100, streaming=True, query_heads=4),
  "streaming_packed": Case(
    documents=((51, 44),), length=99, streaming=True, shared_bounds=True, kv_heads=2
  ),
  "without_groups": Case(
    documents=((75,),), length=75, streaming=True, shared_bounds=True, without_groups=True
  ),
  "full_heads": Case(
    documents=((120, 30), (99,)),
    length=160,
    streaming=True,
    query_heads=4,
    kv_heads=4,
    full_heads=1,
  ),
  "blind_heads": Case(documents=((120,),), length=130, kv_heads=4, query_heads=4, blind_heads=3),
  "bidirectional": Case(
    documents=((70, 21), (90,)), length=96, bidirectional=True, query_heads=4, kv_heads=2
  ),
  "wide_window": Case(documents=((130,),), length=130, streaming=True, group_size=59),
  "wide_head": Case(documents=((70,),), length=70, head_dim=128),
  "widest_head": Case(documents=((70,),), length=70, head_dim=256),
}


def structs_and_options(*, head_dim: int, dtype: str) -> tuple[tuple, dict[str, Any]]:
  """Shapes of the arguments and the cotangent, for lowering without data, and the keywords."""
  B, L, H, N = 2, 1000, 4, 2
  query = jax.ShapeDtypeStruct((B, L, H, head_dim), dtype)
  visible: Any = jax.ShapeDtypeStruct((B, N, L), jnp.int32)
  sources = []
  for size in (211, 117, L):
    kv: Any = jax.ShapeDtypeStruct((B, size, N, head_dim), dtype)
    sources.append(KVSource(kv, kv, visible, visible))
  options = {"scale": 0.1, "group_bias": 0.0, "max_window": 16}
  return (query, KVSources(*sources), query), options


def output_and_gradients(attention: Callable[..., jax.Array], options: dict[str, Any]) -> Any:
  """A function of (query, sources, dout) that returns out, dq and (dk, dv) of each source."""

  def run(query: jax.Array, sources: KVSources, dout: jax.Array) -> Any:
    def attend(query: jax.Array, kv: Any) -> jax.Array:
      return attention(query, sources.with_kv(kv), **options)

    out, vjp = jax.vjp(attend, query, sources.kv)
    return out, vjp(dout.astype(out.dtype))

  return run


def lower_over_heads(attention: Callable[..., jax.Array], mesh: Any) -> tuple[Any, tuple]:
  """A function that computes output and gradients in a shard_map over heads, and its arguments."""
  args, options = structs_and_options(head_dim=64, dtype="bfloat16")
  heads = PartitionSpec(None, None, "heads")
  source = KVSource(heads, heads, *[PartitionSpec(None, "heads")] * 2)
  sharded = jax.shard_map(
    output_and_gradients(attention, options),
    mesh=mesh,
    in_specs=(heads, KVSources(source, source, source), heads),
    out_specs=(heads, (heads, ((heads, heads),) * 3)),
  )
  return sharded, args


def values_and_gradients(
  attention: Callable[..., jax.Array],
  query: jax.Array,
  sources: KVSources,
  options: dict[str, Any],
) -> dict[str, np.ndarray]:
  """The output and the gradients for a random cotangent, by name, converted to float64."""
  dout = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)
  run = jax.jit(output_and_gradients(attention, options))
  out, (dq, dkv) = run(query, sources, dout)
  named = {"out": out, "query": dq}
  for source, (dk, dv) in zip(KVSources._fields, dkv, strict=True):
    named |= {f"{source}_key": dk, f"{source}_value": dv}
  return {name: np.asarray(x).astype(np.float64) for name, x in named.items()}


def exact_values_and_gradients(
  query: jax.Array, sources: KVSources, options: dict[str, Any]
) -> dict[str, np.ndarray]:
  """The output and the gradients of the oracle, computed in float64."""
  query, kv = jax.tree.map(np.asarray, (query, sources.kv))
  with jax.enable_x64(True):
    wide_query, wide_kv = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (query, kv))
    return values_and_gradients(
      grouped_attention_reference, wide_query, sources.with_kv(wide_kv), options
    )


def check_against_reference(attention: Callable[..., jax.Array], case: Case) -> None:
  """Checks the output and the gradients by the rule of `tests.rounding`."""
  query, sources, options = case.inputs()
  exact = exact_values_and_gradients(query, sources, options)
  with jax.default_matmul_precision("highest"):
    plain = values_and_gradients(grouped_attention_xla, query, sources, options)
  terms = _longest_sums(case, sources)
  for name, value in values_and_gradients(attention, query, sources, options).items():
    # A gradient is a sum that depends on the sums of logits, of weights and of dout vᵀ.
    factor, sums = (2, 2) if name == "out" else (3, 4)
    assert_close(
      value,
      exact[name],
      plain=plain[name],
      factor=factor,
      terms=terms[name],
      sums=sums,
      name=name,
    )


def _longest_sums(case: Case, sources: KVSources) -> dict[str, int]:
  """The length of the longest sum in each result, over channels, visible keys or queries."""
  visible = int(sum(np.asarray(source.end - source.start).max() for source in sources))
  terms = dict.fromkeys(("out", "query"), max(case.head_dim, visible))
  for name, source in zip(sources._fields, sources, strict=True):
    key_S = np.arange(source.key.shape[1])
    start, end = (np.asarray(x)[..., None] for x in (source.start, source.end))
    queries = ((start <= key_S) & (key_S < end)).sum(axis=2).max(initial=0)
    rows = int(queries) * case.query_heads // case.kv_heads
    terms |= dict.fromkeys((f"{name}_key", f"{name}_value"), max(terms["out"], rows))
  return terms
