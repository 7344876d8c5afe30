"""Caches of a fixed number of entries that are compressed whenever an interval of tokens is full.

Top-k eviction and KVMerger-style merging share this: tokens are appended; each entry sums up the
attention that it receives; and after every `interval` tokens a rule reduces the entries to
`budget`. Entries lie in the order of their positions, so what a query sees is a prefix, and how
many there are follows from the number of tokens. A whole sequence, a prompt and single tokens all
go through `_advance`: the function is one and causal. With `dense_prompt` a prompt is read whole
instead and compressed once at its end.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from pallas_kernels.masks import masked_softmax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetedCache:
  """Entries in the order of their positions; in decoding with a leading axis of layers.

  Attributes:
    key: of tokens, or of merged runs of them. Entries beyond those held are not read.
    value: likewise.
    received: float32, the attention that queries have paid to each entry, over the query heads
      of its KV head.
    length: tokens that each sequence has seen.
  """

  key: Float[Array, "*layers B N C D"]
  value: Float[Array, "*layers B N C D"]
  received: Float[Array, "*layers B N C"]
  length: Int[Array, "*layers B"]


# (key [C, D], value [C, D], received [C], entries held) of one head -> the same arrays with
# `budget` entries. Entries beyond those held come last and stay last.
Rule = Callable[[Array, Array, Array, Array], tuple[Array, Array, Array]]


@dataclasses.dataclass(frozen=True)
class BudgetedCacheAttention:
  """Attention over at most `budget` + `interval` entries.

  Attributes:
    name: of the attention kind, for messages.
    budget: entries that a compression leaves.
    interval: tokens between two compressions.
    rule: how entries are reduced.
    dense_prompt: whether prompts, and whole sequences, are read with dense attention, and a prompt
      is compressed once at its end. All its queries then decide what stays.
  """

  name: str
  budget: int
  interval: int
  rule: Rule
  dense_prompt: bool = False

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    segment_ids: Int[Array, "B L"] | None,
    lengths: Int[Array, "B"] | None,
  ) -> Float[Array, "B L H D"]:
    """What reading a prompt gives; padded queries give 0.

    Raises:
      ValueError: for packed documents, each of which would need a cache of its own.
    """
    if segment_ids is not None:
      raise ValueError(
        f"segment_ids are given, but attention={self.name!r} wants one document in each row."
      )
    L = q_BxLxHxD.shape[1]
    return self.prefill(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, lengths=lengths, max_length=L)[0]

  def init_cache(
    self, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
  ) -> BudgetedCache:
    """An empty cache of one layer: budget + interval entries, or `max_length` if that is less."""
    entries = min(self.budget + self.interval, max_length)
    key = jnp.zeros((batch, num_kv_heads, entries, head_dim), dtype)
    return BudgetedCache(key, key, jnp.zeros(key.shape[:-1]), jnp.zeros(batch, jnp.int32))

  def prefill(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    *,
    lengths: Int[Array, "B"] | None,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], BudgetedCache]:
    """Reads a right-padded prompt, an interval at a time."""
    B, L, N, D = k_BxLxNxD.shape
    if self.dense_prompt:
      keeping_all = dataclasses.replace(self, budget=L, dense_prompt=False)
      o_BxLxHxD, everything = keeping_all.prefill(
        q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, lengths=lengths, max_length=L
      )
      return o_BxLxHxD, self._compress_prompt(everything, max_length)
    size = min(self.interval, L)
    blocks = math.ceil(L / size)
    length_B = jnp.full(B, L) if lengths is None else lengths
    is_token_BxL = jnp.arange(blocks * size)[None] < length_B[:, None]

    def split(x_BxLxHxD: Array) -> Float[Array, "T B b H D"]:
      padding = ((0, 0), (0, blocks * size - L), (0, 0), (0, 0))
      x_BxTxbxHxD = jnp.pad(x_BxLxHxD, padding).reshape(B, blocks, size, *x_BxLxHxD.shape[2:])
      return jnp.moveaxis(x_BxTxbxHxD, 1, 0)

    @jax.checkpoint
    def step(
      cache: BudgetedCache, block: tuple[Array, Array, Array, Array]
    ) -> tuple[BudgetedCache, Array]:
      q_BxbxHxD, k_BxbxNxD, v_BxbxNxD, is_token_Bxb = block
      o_BxbxHxD, cache = self._advance(
        q_BxbxHxD, k_BxbxNxD, v_BxbxNxD, is_token_Bxb, cache, jnp.int32(0)
      )
      return cache, o_BxbxHxD

    is_token_TxBxb = jnp.moveaxis(is_token_BxL.reshape(B, blocks, size), 1, 0)
    empty = self.init_cache(B, max_length, N, D, k_BxLxNxD.dtype)
    cache, o_TxBxbxHxD = jax.lax.scan(
      step,
      jax.tree.map(lambda x: x[None], empty),
      (*map(split, (q_BxLxHxD, k_BxLxNxD, v_BxLxNxD)), is_token_TxBxb),
    )
    o_BxLxHxD = jnp.moveaxis(o_TxBxbxHxD, 0, 1).reshape(B, blocks * size, *q_BxLxHxD.shape[2:])
    return o_BxLxHxD[:, :L], jax.tree.map(lambda x: x[0], cache)

  def decode(
    self,
    q_BxHxD: Float[Array, "B H D"],
    k_BxNxD: Float[Array, "B N D"],
    v_BxNxD: Float[Array, "B N D"],
    cache: BudgetedCache,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B H D"], BudgetedCache]:
    """Appends one token, attends, and compresses the caches whose interval is full."""
    q, k, v = (x[:, None] for x in (q_BxHxD, k_BxNxD, v_BxNxD))
    is_token_Bx1 = jnp.ones((q.shape[0], 1), bool)
    o_Bx1xHxD, cache = self._advance(q, k, v, is_token_Bx1, cache, layer)
    return o_Bx1xHxD[:, 0], cache

  def _compress_prompt(self, prompt: BudgetedCache, max_length: int) -> BudgetedCache:
    """From all tokens of a prompt to the cache: whole intervals compressed, the rest raw."""
    B, N, L, D = prompt.key.shape
    empty = self.init_cache(B, max_length, N, D, prompt.key.dtype)
    entries = empty.key.shape[2]
    whole_B = prompt.length // self.interval * self.interval
    arrays = (prompt.key, prompt.value, prompt.received)
    reduced = arrays if self.budget >= L else self._reduce(*arrays, whole_B)
    rest_BxI = jnp.arange(min(self.interval, L))[None]
    slot_BxI = jnp.minimum(whole_B, self.budget)[:, None] + rest_BxI
    row_Bx1 = jnp.arange(B)[:, None]

    def store(all_tokens: Array, few: Array) -> Array:
      free = [(0, 0)] * few.ndim
      free[2] = (0, entries - few.shape[2])
      rest = all_tokens.at[row_Bx1, :, whole_B[:, None] + rest_BxI].get(mode="fill", fill_value=0)
      return jnp.pad(few, free).at[row_Bx1, :, slot_BxI].set(rest, mode="drop")

    key, value, received = map(store, arrays, reduced)
    return BudgetedCache(key, value, received, prompt.length)

  def _reduce(
    self, key: Array, value: Array, received: Array, held_B: Array
  ) -> tuple[Array, Array, Array]:
    """The rule, for every row and head."""
    of_heads = jax.vmap(self.rule, in_axes=(0, 0, 0, None))
    return jax.vmap(of_heads)(key, value, received, held_B)

  def _advance(
    self,
    q_BxTxHxD: Array,
    k_BxTxNxD: Array,
    v_BxTxNxD: Array,
    is_token_BxT: Bool[Array, "B T"],
    cache: BudgetedCache,
    layer: Array,
  ) -> tuple[Array, BudgetedCache]:
    """Reads T tokens that lie in one interval; in each row, padding comes after tokens."""
    (B, T, H, D), N = q_BxTxHxD.shape, k_BxTxNxD.shape[2]
    entries = cache.key.shape[-2]
    length_B = cache.length[layer]
    held_B = jnp.minimum(length_B // self.interval * self.interval, self.budget)
    held_B += length_B % self.interval
    slot_BxT = jnp.where(is_token_BxT, held_B[:, None] + jnp.arange(T)[None], entries)
    row_Bx1 = jnp.arange(B)[:, None]
    key = cache.key.at[layer, row_Bx1, :, slot_BxT].set(k_BxTxNxD, mode="drop")
    value = cache.value.at[layer, row_Bx1, :, slot_BxT].set(v_BxTxNxD, mode="drop")

    logits_BxNxRxTxC = D**-0.5 * jnp.einsum(
      "btnrd,bncd->bnrtc",
      q_BxTxHxD.reshape(B, T, N, H // N, D),
      key[layer],
      preferred_element_type=jnp.float32,
    )
    visible_BxTxC = jnp.arange(entries)[None, None] <= slot_BxT[..., None]
    visible_BxTxC &= is_token_BxT[..., None]
    weights = masked_softmax(logits_BxNxRxTxC, visible_BxTxC[:, None, None])
    o_BxTxNxRxD = jnp.einsum("bnrtc,bncd->btnrd", weights.astype(value.dtype), value[layer])

    tokens_B = is_token_BxT.sum(axis=1, dtype=jnp.int32)
    paid_BxNxC = jax.lax.stop_gradient(weights).sum(axis=(2, 3))
    received = cache.received.at[layer].add(paid_BxNxC)
    tokens_B = is_token_BxT.sum(axis=1, dtype=jnp.int32)
    cache = BudgetedCache(key, value, received, cache.length.at[layer].add(tokens_B))
    if entries > self.budget:
      full_B = (tokens_B > 0) & (cache.length[layer] % self.interval == 0)
      cache = self._compress(cache, layer, held_B + tokens_B, full_B)
    return o_BxTxNxRxD.reshape(B, T, H, D), cache

  def _compress(
    self, cache: BudgetedCache, layer: Array, held_B: Array, full_B: Array
  ) -> BudgetedCache:
    """Applies the rule to the rows whose interval is full and that hold more than the budget."""
    full_B &= held_B > self.budget

    def reduce(arrays: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
      key, value, received = map(choose, arrays, self._reduce(*arrays, held_B))
      return key, value, received

    def choose(old: Array, new: Array) -> Array:
      free = [(0, 0)] * new.ndim
      free[2] = (0, old.shape[2] - new.shape[2])
      return jnp.where(full_B.reshape(-1, *(1,) * (old.ndim - 1)), jnp.pad(new, free), old)

    # One layer goes through the conditional: with all of them XLA would copy them all.
    one_layer = (cache.key[layer], cache.value[layer], cache.received[layer])
    key, value, received = jax.lax.cond(full_B.any(), reduce, lambda same: same, one_layer)
    return BudgetedCache(
      cache.key.at[layer].set(key),
      cache.value.at[layer].set(value),
      cache.received.at[layer].set(received),
      cache.length,
    )
