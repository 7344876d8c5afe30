"""One decoding step over the compact cache."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.aggregate import merge, take_rows
from dga_jax.attention.importance import block_scores, masked_softmax
from dga_jax.cache.state import CompactCache, ring_age
from dga_jax.config import DGAConfig


def decode_step(
    query_BxHxD: Float[Array, "B H D"],
    key_BxNxD: Float[Array, "B N D"],
    value_BxNxD: Float[Array, "B N D"],
    cache: CompactCache,
    config: DGAConfig,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H D"], CompactCache]:
    """Appends one token to every sequence, attends, and flushes the blocks that it completes.

    Each sequence flushes at its own time; shapes are static. Tokens beyond the `max_length` that
    the cache was made for cannot raise under jit: their summaries are dropped.
    """
    place = _Place.of(cache, config)
    cache = _append(key_BxNxD, value_BxNxD, cache, place)
    out_BxHxD = _attend(query_BxHxD, cache, place, config, scale)
    return out_BxHxD, _flush(query_BxHxD, cache, place, config)


class _Place(NamedTuple):
    """Where the token that is being decoded stands."""

    in_prefix: Bool[Array, "B"]
    position: Int[Array, "B"]
    block: Int[Array, "B"]
    offset: Int[Array, "B"]
    slot: Int[Array, "B"]  # in the raw ring

    @classmethod
    def of(cls, cache: CompactCache, config: DGAConfig) -> "_Place":
        after_B = cache.length - cache.origin
        block_B, offset_B = after_B // config.block_size, after_B % config.block_size
        ring_B = block_B % (config.local_window + 1)
        return cls(
            in_prefix=after_B < 0,
            position=cache.length,
            block=block_B,
            offset=offset_B,
            slot=ring_B * config.block_size + offset_B,
        )


def _append(
    key_BxNxD: Array, value_BxNxD: Array, cache: CompactCache, place: _Place
) -> CompactCache:
    row_B = jnp.arange(key_BxNxD.shape[0])
    compact_B = jnp.where(place.in_prefix, place.position, cache.compact_key.shape[1])
    raw_B = jnp.where(place.in_prefix, cache.raw_key.shape[1], place.slot)
    return dataclasses.replace(
        cache,
        compact_key=cache.compact_key.at[row_B, compact_B].set(key_BxNxD, mode="drop"),
        compact_value=cache.compact_value.at[row_B, compact_B].set(value_BxNxD, mode="drop"),
        raw_key=cache.raw_key.at[row_B, raw_B].set(key_BxNxD, mode="drop"),
        raw_value=cache.raw_value.at[row_B, raw_B].set(value_BxNxD, mode="drop"),
        length=cache.length + 1,
    )


def _attend(
    query_BxHxD: Array,
    cache: CompactCache,
    place: _Place,
    config: DGAConfig,
    scale: float | None,
) -> Array:
    B, H, D = query_BxHxD.shape
    C, N = cache.compact_key.shape[1:3]
    q_BxNxRxD = query_BxHxD.reshape(B, N, H // N, D)
    scale = D**-0.5 if scale is None else scale

    entry_1xC = jnp.arange(C)[None]
    per_block = config.focal_in_block + 1
    summarised_B = jnp.maximum(place.block - config.local_window, 0)
    seen_B = jnp.where(
        place.in_prefix, place.position + 1, cache.prefix + per_block * summarised_B
    )
    age_BxW, place_W = ring_age(place.block, cache.raw_key.shape[1], config)
    written_BxW = (age_BxW > 0) | (place_W[None] <= place.offset[:, None])
    visible_BxS = jnp.concatenate(
        [
            entry_1xC < seen_B[:, None],
            written_BxW & (age_BxW <= place.block[:, None]) & ~place.in_prefix[:, None],
        ],
        axis=1,
    )
    logits_BxNxRxS = scale * jnp.concatenate(
        [
            jnp.einsum("bnrd,bsnd->bnrs", q_BxNxRxD, key, preferred_element_type=jnp.float32)
            for key in (cache.compact_key, cache.raw_key)
        ],
        axis=-1,
    )
    if config.group_logit_bias == "log_size":
        after_BxC = entry_1xC - cache.prefix[:, None]
        group_BxC = jnp.where(
            after_BxC < 0,
            entry_1xC >= cache.prefix_focal[:, None],
            after_BxC % per_block == config.focal_in_block,
        )
        bias_BxC = group_BxC * jnp.log(jnp.float32(config.group_size))
        logits_BxNxRxS += jnp.pad(bias_BxC, ((0, 0), (0, visible_BxS.shape[1] - C)))[:, None, None]
    weights = masked_softmax(logits_BxNxRxS, visible_BxS[:, None, None])
    weights = weights.astype(query_BxHxD.dtype)
    out_BxNxRxD = sum(
        jnp.einsum("bnrs,bsnd->bnrd", part, value, preferred_element_type=jnp.float32)
        for part, value in (
            (weights[..., :C], cache.compact_value),
            (weights[..., C:], cache.raw_value),
        )
    )
    return out_BxNxRxD.reshape(B, H, D).astype(query_BxHxD.dtype)


def _flush(
    query_BxHxD: Array, cache: CompactCache, place: _Place, config: DGAConfig
) -> CompactCache:
    """Where a block is complete, its last query chooses f tokens and merges the other m."""
    B, H, D = query_BxHxD.shape
    N, size, f = cache.raw_key.shape[2], config.block_size, config.focal_in_block
    begin_B = place.slot - place.offset
    in_ring_BxNxs = jnp.broadcast_to(
        (begin_B[:, None] + jnp.arange(size)[None])[:, None], (B, N, size)
    )
    key_BxsxNxD, value_BxsxNxD = (
        take_rows(x, in_ring_BxNxs) for x in (cache.raw_key, cache.raw_value)
    )
    q_BxNxRxD = query_BxHxD.reshape(B, N, H // N, D)
    scores_BxNxs = block_scores(q_BxNxRxD[:, None], key_BxsxNxD[:, None])[:, :, 0]
    by_rank_BxNxs = jnp.argsort(-scores_BxNxs, axis=-1, stable=True)
    # Members in position order, so that the merge sums as the prefill does.
    focal_BxNxf, member_BxNxm = by_rank_BxNxs[..., :f], jnp.sort(by_rank_BxNxs[..., f:], axis=-1)
    group_key_BxNxD, group_value_BxNxD = merge(
        q_BxNxRxD, take_rows(key_BxsxNxD, member_BxNxm), take_rows(value_BxsxNxD, member_BxNxm),
        config,
    )
    full_B = ~place.in_prefix & (place.offset == size - 1)
    begin_B = cache.prefix + (f + 1) * place.block
    entry_BxF = begin_B[:, None] + jnp.arange(f + 1)[None]
    entry_BxF = jnp.where(full_B[:, None], entry_BxF, cache.compact_key.shape[1])
    row_Bx1 = jnp.arange(B)[:, None]

    def store(compact: Array, block_BxsxNxD: Array, group_BxNxD: Array) -> Array:
        new_BxFxNxD = jnp.concatenate(
            [take_rows(block_BxsxNxD, focal_BxNxf), group_BxNxD[:, None]], axis=1
        )
        return compact.at[row_Bx1, entry_BxF].set(new_BxFxNxD, mode="drop")

    return dataclasses.replace(
        cache,
        compact_key=store(cache.compact_key, key_BxsxNxD, group_key_BxNxD),
        compact_value=store(cache.compact_value, value_BxsxNxD, group_value_BxNxD),
    )


