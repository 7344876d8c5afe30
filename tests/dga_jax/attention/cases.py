"""Shared inputs of the attention tests: random arrays, configs, and the op with its gradients."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from dga_jax import DGAConfig, dynamic_group_attention, GroupPlan


def arrays(seed, B, L, H, N, D, dtype=jnp.float32):
  """Random query, key, value and cotangent of the output."""
  keys = jax.random.split(jax.random.key(seed), 4)
  heads = (H, N, N, H)
  return tuple(
    jax.random.normal(key, (B, L, heads_, D)).astype(dtype)
    for key, heads_ in zip(keys, heads, strict=True)
  )


@functools.partial(jax.jit, static_argnames=("config", "implementation", "scale"))
def run(q, k, v, t, *, config, implementation, scale=None, **rows):
  """The output, and the gradients of q, k and v for the cotangent t.

  Args:
    rows: lengths, segment_ids and focal_scores of the op.
  """

  def op(q, k, v):
    return dynamic_group_attention(
      q,
      k,
      v,
      config=config,
      scale=scale,
      implementation=implementation,
      **rows,
    )

  out, pull = jax.vjp(op, q, k, v)
  return out, *pull(t)


def dense(q, k, v):
  """Causal softmax attention in NumPy, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, L, H, D = q.shape
  out = np.zeros_like(q)
  for b in range(B):
    for h in range(H):
      n = h // (H // k.shape[2])
      logits = q[b, :, h] @ k[b, :, n].T / np.sqrt(D)
      logits[np.triu_indices(L, 1)] = -np.inf
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, n]
  return out


_SMALL = DGAConfig(
  group_size=4, min_focal_tokens=0, n_recent=4, n_random=3, max_documents=4, importance_rate=0.2
)


def _with(**changes):
  return dataclasses.replace(_SMALL, **changes)


# Every value of each setting, and the combinations of settings that share code.
CONFIGS = {
  "global": _with(),
  "global-exclusive-sinks": _with(visibility="exclusive", sink_tokens=3),
  "global-no-complementary-bias": _with(complementary=False, group_logit_bias="log_size"),
  "global-floor-unscaled": _with(min_focal_tokens=5, aggregation_scale="none", n_recent=0),
  "global-m1": _with(group_size=1, n_random=0),
  "global-no-rate-m7": _with(group_size=7, importance_rate=0.0, visibility="exclusive"),
  "random": _with(selection="random", seed=3),
  "random-sinks-bias": _with(selection="random", sink_tokens=2, group_logit_bias="log_size"),
  "streaming": _with(selection="streaming"),
  "streaming-f3-unscaled": _with(
    selection="streaming", focal_per_block=3, aggregation_scale="none"
  ),
  "streaming-sinks-window": _with(selection="streaming", sink_tokens=3, local_window=1),
  "streaming-window2-bias": _with(
    selection="streaming", group_size=3, local_window=2, group_logit_bias="log_size"
  ),
  "bidirectional-global-sinks": _with(causal=False, sink_tokens=2),
  "bidirectional-random-bias": _with(
    causal=False, selection="random", complementary=False, group_logit_bias="log_size"
  ),
  "bidirectional-streaming-sinks-window": _with(
    causal=False, selection="streaming", group_size=3, sink_tokens=2, local_window=1
  ),
}


@st.composite
def rows(draw, B, L):
  """Draws row lengths, and up to four packed documents per row, with padding between some."""
  lengths = np.array([draw(st.sampled_from([L, draw(st.integers(0, L))])) for _ in range(B)])
  ids = np.empty((B, L), np.int32)
  for b in range(B):
    cuts = sorted(draw(st.lists(st.integers(0, L), min_size=3, max_size=3)))
    ids[b] = np.repeat(np.arange(4), np.diff([0, *cuts, L]))
    if draw(st.booleans()):
      ids[b, ids[b] == 2] = -1
  return {"lengths": lengths.astype(np.int32), "segment_ids": ids}


def documents_of(B, L, lengths=None, segment_ids=None):
  """The (row, slice) of every document, found in plain Python."""
  found = []
  for b in range(B):
    ids = np.zeros(L, int) if segment_ids is None else np.array(segment_ids[b])
    if lengths is not None:
      ids = np.where(np.arange(L) < lengths[b], ids, -1)
    start = 0
    for i in range(1, L + 1):
      if i == L or ids[i] != ids[start]:
        if ids[start] >= 0:
          found.append((b, slice(start, i)))
        start = i
  return found


def fixed_mask_plan(positions, length, config):
  """The plan of one row and one KV head whose focal tokens are at `positions`."""
  mask = np.zeros((1, 1, length), bool)
  mask[0, 0, list(positions)] = True
  return GroupPlan.from_focal_mask(jnp.asarray(mask), config=config)
