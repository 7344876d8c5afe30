"""Caches of a fixed number of entries, compressed by a rule after every interval of tokens.

Top-k eviction and KVMerger share this: tokens are appended, each entry accumulates the attention
that queries pay to it, and after every `interval` tokens a rule reduces the entries to `budget`.
Entries are in order of position, so a query sees a prefix of them, whose length follows from the
number of tokens. Training, prefill and decoding share `_advance`, so all three compute the same
causal function. With `dense_prompt`, a prompt is read with dense attention and compressed once at
its end.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from dga_jax.attention.segments import Documents
from dga_jax.model.attention_kinds.base import AttentionKind
from pallas_kernels.masks import masked_softmax
from pallas_kernels.products import einsum_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetedCache:
  """Entries in order of position. While decoding, arrays have a leading axis of layers.

  Attributes:
    key: keys of tokens or of merged runs. Entries beyond those held are not read.
    value: their values.
    accumulated_attention: float32, the attention that queries have paid to each entry, summed over
      the query heads of its KV head.
    length: tokens that each sequence has seen.
  """

  key: Float[Array, "*layers B N C D"]
  value: Float[Array, "*layers B N C D"]
  accumulated_attention: Float[Array, "*layers B N C"]
  length: Int[Array, "*layers B"]


# (key [C, D], value [C, D], accumulated attention [C], entries held) of one head -> the same arrays
# with `budget` entries. Entries beyond those held are last and stay last.
Rule = Callable[[Array, Array, Array, Array], tuple[Array, Array, Array]]


@dataclasses.dataclass(frozen=True)
class BudgetedCacheAttention(AttentionKind):
  """Attention over at most `budget` + `interval` entries.

  Attributes:
    name: the attention kind.
    budget: entries that a compression keeps.
    interval: tokens between two compressions.
    rule: reduces the entries.
    dense_prompt: whether prompts and whole sequences are read with dense attention, and a prompt is
      compressed once at its end, by the attention of all its queries.
  """

  name: str
  budget: int
  interval: int
  rule: Rule
  dense_prompt: bool = False

  one_document = True  # Each document would need a cache of its own.

  def attend(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    metadata: Documents,
  ) -> Float[Array, "B L H D"]:
    """The output of reading the rows as prompts; padding outputs 0."""
    L = q_BxLxHxD.shape[1]
    return self.prefill(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata, max_length=L)[0]

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
    metadata: Documents,
    *,
    max_length: int,
  ) -> tuple[Float[Array, "B L H D"], BudgetedCache]:
    """Reads right-padded prompts, an interval at a time."""
    B, L, N, D = k_BxLxNxD.shape
    if self.dense_prompt:
      keeping_all = dataclasses.replace(self, budget=L, dense_prompt=False)
      o_BxLxHxD, everything = keeping_all.prefill(
        q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, metadata, max_length=L
      )
      return o_BxLxHxD, self._compress_prompt(everything, max_length)
    size = min(self.interval, L)
    blocks = math.ceil(L / size)
    is_token_BxP = jnp.arange(blocks * size)[None] < metadata.row_length[:, None]

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

    is_token_TxBxb = jnp.moveaxis(is_token_BxP.reshape(B, blocks, size), 1, 0)
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
    """Appends one token, attends, and compresses the rows whose interval is full."""
    q, k, v = (x[:, None] for x in (q_BxHxD, k_BxNxD, v_BxNxD))
    is_token_Bx1 = jnp.ones((q.shape[0], 1), bool)
    o_Bx1xHxD, cache = self._advance(q, k, v, is_token_Bx1, cache, layer)
    return o_Bx1xHxD[:, 0], cache

  def _compress_prompt(self, prompt: BudgetedCache, max_length: int) -> BudgetedCache:
    """The cache of a prompt whose tokens are all held: whole intervals compressed, others raw."""
    B, N, L, D = prompt.key.shape
    empty = self.init_cache(B, max_length, N, D, prompt.key.dtype)
    entries = empty.key.shape[2]
    whole_B = prompt.length // self.interval * self.interval
    arrays = (prompt.key, prompt.value, prompt.accumulated_attention)
    reduced = arrays if self.budget >= L else self._reduce(*arrays, whole_B)
    rest_BxI = jnp.arange(min(self.interval, L))[None]
    slot_BxI = jnp.minimum(whole_B, self.budget)[:, None] + rest_BxI
    row_Bx1 = jnp.arange(B)[:, None]

    def store(all_tokens: Array, few: Array) -> Array:
      free = [(0, 0)] * few.ndim
      free[2] = (0, entries - few.shape[2])
      rest = all_tokens.at[row_Bx1, :, whole_B[:, None] + rest_BxI].get(mode="fill", fill_value=0)
      return jnp.pad(few, free).at[row_Bx1, :, slot_BxI].set(rest, mode="drop")

    key, value, accumulated = map(store, arrays, reduced)
    return BudgetedCache(key, value, accumulated, prompt.length)

  def _reduce(
    self, key: Array, value: Array, accumulated: Array, held_B: Array
  ) -> tuple[Array, Array, Array]:
    """Applies the rule to every row and head."""
    of_heads = jax.vmap(self.rule, in_axes=(0, 0, 0, None))
    return jax.vmap(of_heads)(key, value, accumulated, held_B)

  def _advance(
    self,
    q_BxTxHxD: Array,
    k_BxTxNxD: Array,
    v_BxTxNxD: Array,
    is_token_BxT: Bool[Array, "B T"],
    cache: BudgetedCache,
    layer: Array,
  ) -> tuple[Array, BudgetedCache]:
    """Reads T tokens of one interval; in each row, padding follows the tokens."""
    (B, T, H, D), N = q_BxTxHxD.shape, k_BxTxNxD.shape[2]
    entries = cache.key.shape[-2]
    length_B = cache.length[layer]
    held_B = jnp.minimum(length_B // self.interval * self.interval, self.budget)
    held_B += length_B % self.interval
    slot_BxT = jnp.where(is_token_BxT, held_B[:, None] + jnp.arange(T)[None], entries)
    row_Bx1 = jnp.arange(B)[:, None]
    key = cache.key.at[layer, row_Bx1, :, slot_BxT].set(k_BxTxNxD, mode="drop")
    value = cache.value.at[layer, row_Bx1, :, slot_BxT].set(v_BxTxNxD, mode="drop")

    logits_BxNxRxTxC = D**-0.5 * einsum_float32(
      "btnrd,bncd->bnrtc", q_BxTxHxD.reshape(B, T, N, H // N, D), key[layer]
    )
    visible_BxTxC = jnp.arange(entries)[None, None] <= slot_BxT[..., None]
    visible_BxTxC &= is_token_BxT[..., None]
    weights = masked_softmax(logits_BxNxRxTxC, visible_BxTxC[:, None, None])
    o_BxTxNxRxD = jnp.einsum("bnrtc,bncd->btnrd", weights.astype(value.dtype), value[layer])

    paid_BxNxC = jax.lax.stop_gradient(weights).sum(axis=(2, 3))
    accumulated = cache.accumulated_attention.at[layer].add(paid_BxNxC)
    tokens_B = is_token_BxT.sum(axis=1, dtype=jnp.int32)
    cache = BudgetedCache(key, value, accumulated, cache.length.at[layer].add(tokens_B))
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
      key, value, accumulated = map(choose, arrays, self._reduce(*arrays, held_B))
      return key, value, accumulated

    def choose(old: Array, new: Array) -> Array:
      free = [(0, 0)] * new.ndim
      free[2] = (0, old.shape[2] - new.shape[2])
      return jnp.where(full_B.reshape(-1, *(1,) * (old.ndim - 1)), jnp.pad(new, free), old)

    # The conditional takes one layer alone: XLA would copy all layers if it took them.
    one_layer = (cache.key[layer], cache.value[layer], cache.accumulated_attention[layer])
    key, value, accumulated = jax.lax.cond(full_B.any(), reduce, lambda same: same, one_layer)
    return BudgetedCache(
      cache.key.at[layer].set(key),
      cache.value.at[layer].set(value),
      cache.accumulated_attention.at[layer].set(accumulated),
      cache.length,
    )
