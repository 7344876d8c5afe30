"""`visibility` equals the reference's masks, and merge weights reproduce the merged values."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dga_jax import DGAConfig, plan_groups
from dga_jax.analyse import merge_weights, Seen, visibility
from dga_jax.attention.attend import merge_planned
from dga_jax.attention.reference import write_masks
from tests.dga_jax.attention.cases import arrays, CONFIGS, fixed_mask_plan, rows

L = 40
make_plan = jax.jit(plan_groups, static_argnames="config")


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4)
@given(data=st.data())
def test_visibility_equals_the_dense_masks(name, data):
  where = data.draw(rows(2, L))
  q, k, _, _ = arrays(0, 2, L, 4, 2, 4)
  plan = make_plan(q, k, config=CONFIGS[name], **where)
  for row, head in ((0, 1), (1, 0)):
    focal_L = np.array(plan.focal_mask[row, head])
    masks = write_masks(focal_L, plan.documents.index[row], CONFIGS[name])
    merged = np.array(masks.sees_group) @ np.array(masks.member)
    seen = visibility(plan, row=row, head=head)
    np.testing.assert_array_equal((seen == Seen.FOCAL) | (seen == Seen.RAW), masks.sees_token)
    np.testing.assert_array_equal(seen == Seen.MERGED, merged)
    assert not (seen == Seen.FOCAL)[:, ~focal_L].any()


def test_visibility_of_the_papers_figure_1():
  """The figure has 9 tokens with focal tokens {4, 7, 9} and groups {1, 2, 3} and {5, 6, 8}."""
  plan = fixed_mask_plan([3, 6, 8], 9, DGAConfig(group_size=3))
  want = ["3", "33", "222", "2221", "22213", "222133", "2221331", "22212212", "222122121"]
  seen = ["".join(map(str, line[: i + 1])) for i, line in enumerate(visibility(plan))]
  assert seen == want


@pytest.mark.parametrize("name", ["global", "streaming", "streaming-f3-unscaled"])
def test_merge_weights_give_the_merged_values_of_the_op(name):
  lengths = jnp.array([L, 23])
  q, k, v, _ = arrays(0, 2, L, 4, 2, 8)
  plan = make_plan(q, k, config=CONFIGS[name], lengths=lengths)
  group_key = merge_planned(q, k, v, plan).sources.group.key
  for row, head in ((0, 1), (1, 0)):
    weights = merge_weights(q, k, plan, row=row, head=head)
    members = np.array(plan.layout.member_index[row, head])
    filled = members[:, 0] < L
    assert filled.any()
    np.testing.assert_allclose(weights.sum(axis=1), filled, atol=1e-6)
    for group, own in zip(weights[filled], members[filled], strict=True):
      np.testing.assert_array_equal(np.flatnonzero(group), own)
    np.testing.assert_allclose(weights @ k[row, :, head], group_key[row, :, head], atol=1e-5)


def test_errors_name_the_invalid_argument():
  q, k, _, _ = arrays(0, 1, L, 4, 2, 4)
  plan = make_plan(q, k, config=CONFIGS["global"])
  with pytest.raises(ValueError, match=r"plan\.focal_mask has shape \(1, 2, 40\)"):
    merge_weights(q[:, :8], k[:, :8], plan)
  with pytest.raises(IndexError):
    visibility(plan, head=2)
