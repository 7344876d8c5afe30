"""Dynamic Group Attention of one document in plain Python and float64, as the paper defines it.

The oracle uses sets and loops where the library uses masks and index lists. It shares only the
random draws with the library.
"""

import dataclasses
import functools
from fractions import Fraction

import jax
import numpy as np

from dga_jax import DGAConfig
from dga_jax.attention.scores import uniform_by_position


def softmax(x):
  weights = np.exp(x - x.max())
  return weights / weights.sum()


# Positions up to the longest document. A draw depends on the position, not on the length.
LONGEST = np.arange(64)[None]


@functools.cache
def draws_of_queries(seed):
  return np.array(uniform_by_position(jax.random.key(seed), LONGEST)[0], np.float64)


@functools.cache
def draws_of_head(seed, heads):
  keys = jax.random.split(jax.random.key(seed), heads)
  return np.array([uniform_by_position(key, LONGEST)[0] for key in keys], np.float64)


@dataclasses.dataclass
class Oracle:
  """Computes one document with q [L, H, D], k and v [L, N, D].

  `Oracle(...)()` returns the output [L, H, D].
  """

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  config: DGAConfig
  scale: float | None = None

  def __post_init__(self):
    self.q, self.k, self.v = (np.asarray(x, np.float64) for x in (self.q, self.k, self.v))
    self.L, self.H, self.D = self.q.shape
    self.N = self.k.shape[1]
    self.R = self.H // self.N

  def focal(self, n):
    """Positions of the focal tokens of KV head n."""
    c, L = self.config, self.L
    if c.selection == "streaming":
      kept = set(range(min(c.sink_tokens, L)))
      for block in self.blocks():
        scores = sum(
          softmax(self.k[block, n] @ self.q[block[-1], h] / np.sqrt(self.D))
          for h in range(n * self.R, (n + 1) * self.R)
        )
        kept |= {block[j] for j in np.argsort(-scores, kind="stable")[: c.focal_in_block]}
      if not c.causal:
        kept |= set(range(L)) - {j for block in self.blocks() for j in block}
      return kept
    at_rate = -(-Fraction(str(c.importance_rate)) * L // 1)
    r = min(L, max(int(at_rate), c.min_focal_tokens, c.sink_tokens))
    r += (L - r) % c.group_size
    scores = self.draws(n) if c.selection == "random" else self.importance(n)
    scores[: c.sink_tokens] = np.inf
    return set(np.argsort(-scores, kind="stable")[:r])

  def draws(self, n):
    """Random scores of KV head n."""
    return draws_of_head(self.config.seed, self.N)[n][: self.L].copy()

  def importance(self, n):
    """Scores of KV head n: mean attention of the sampled queries that see each key (Eq. 16, 17).

    A sampled query sees the keys up to itself; all keys in bidirectional attention.
    """
    c, L = self.config, self.L
    recent = list(range(max(0, L - c.n_recent), L))
    earlier = L - len(recent)
    draw = draws_of_queries(c.seed)[:earlier]
    sampled = recent + list(np.argsort(-draw, kind="stable")[: c.n_random])
    scores, seen = np.zeros(L), np.zeros(L)
    for i in sampled:
      end = i + 1 if c.causal else L
      seen[:end] += 1
      for h in range(n * self.R, (n + 1) * self.R):
        scores[:end] += softmax(self.k[:end, n] @ self.q[i, h] / np.sqrt(self.D))
    return scores / np.maximum(seen, 1)

  def blocks(self):
    """The positions of each complete streaming block."""
    c = self.config
    starts = range(c.sink_tokens, self.L - c.block_size + 1, c.block_size)
    return [list(range(start, start + c.block_size)) for start in starts]

  def groups(self, focal):
    """(positions of the members, position of the merging query) of every complete group."""
    c = self.config
    if c.selection == "streaming":
      return [([j for j in block if j not in focal], block[-1]) for block in self.blocks()]
    nonfocal = [j for j in range(self.L) if j not in focal]
    whole = len(nonfocal) // c.group_size
    runs = [nonfocal[g * c.group_size : (g + 1) * c.group_size] for g in range(whole)]
    return [(run, run[-1]) for run in runs]

  def merged(self, n, members, i):
    """Key and value of a group of KV head n. Query i weights the members."""
    scale = self.D**-0.5 if self.config.aggregation_scale == "head_dim" else 1.0
    weights = np.mean(
      [
        softmax(self.k[members, n] @ self.q[i, h] * scale)
        for h in range(n * self.R, (n + 1) * self.R)
      ],
      axis=0,
    )
    return weights @ self.k[members, n], weights @ self.v[members, n]

  def visible(self, i, focal, groups):
    """The positions of the tokens that query i sees unmerged, and the groups that it sees."""
    c = self.config
    if not c.causal:
      return self.visible_both_ways(i, focal, groups)
    if c.selection == "streaming":
      if i < c.sink_tokens:
        return list(range(i + 1)), []
      near = max(0, (i - c.sink_tokens) // c.block_size - c.local_window)
      begin = c.sink_tokens + near * c.block_size
      far = sorted(j for j in focal if j < begin)
      return far + list(range(begin, i + 1)), list(range(near))
    over = [g for g, (run, _) in enumerate(groups) if run[-1] < i + (c.visibility == "inclusive")]
    raw = [j for j in focal if j <= i]
    if c.complementary:
      hidden = {j for g in over for j in groups[g][0]}
      raw += [j for j in range(i + 1) if j not in focal and j not in hidden]
    return sorted(raw), over

  def visible_both_ways(self, i, focal, groups):
    """As `visible`, where a query sees all focal tokens and every group, raw or merged.

    Raw are the group whose span contains i and w groups on both sides of it, or of i itself.
    """
    before = sum(run[-1] < i for run, _ in groups)
    after = sum(run[0] > i for run, _ in groups)
    w = self.config.local_window
    near = range(max(0, before - w), min(len(groups), len(groups) - after + w))
    members = [j for g in near for j in groups[g][0]] if self.config.complementary else []
    return sorted(focal) + members, [g for g in range(len(groups)) if g not in near]

  def __call__(self):
    """The output [L, H, D]."""
    c = self.config
    out = np.zeros((self.L, self.H, self.D))
    bias = np.log(c.group_size) if c.group_logit_bias == "log_size" else 0.0
    scale = self.D**-0.5 if self.scale is None else self.scale
    for n in range(self.N):
      focal = self.focal(n)
      groups = self.groups(focal)
      merged = [self.merged(n, *group) for group in groups]
      for i in range(self.L):
        raw, over = self.visible(i, focal, groups)
        if not raw and not over:
          continue
        keys = np.array([self.k[j, n] for j in raw] + [merged[g][0] for g in over])
        values = np.array([self.v[j, n] for j in raw] + [merged[g][1] for g in over])
        biases = np.array([0.0] * len(raw) + [bias] * len(over))
        for h in range(n * self.R, (n + 1) * self.R):
          out[i, h] = softmax(scale * keys @ self.q[i, h] + biases) @ values
    return out
