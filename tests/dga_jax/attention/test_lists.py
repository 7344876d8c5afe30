"""`lengths` and `segment_ids` may be lists."""

import jax
import numpy as np

from dga_jax import DGAConfig, dynamic_group_attention, GroupPlan, plan_groups

CONFIG = DGAConfig(group_size=4, min_focal_tokens=0)


def test_lists_give_the_same_output_as_arrays():
  lengths, ids = [12, 7], [[0] * 5 + [1] * 7, [3] * 9 + [-1] * 3]
  q = jax.random.normal(jax.random.key(0), (2, 12, 4, 8))
  k = jax.random.normal(jax.random.key(1), (2, 12, 2, 8))
  got = dynamic_group_attention(q, k, k, config=CONFIG, lengths=lengths, segment_ids=ids)
  arrays = {"lengths": np.array(lengths), "segment_ids": np.array(ids)}
  want = dynamic_group_attention(q, k, k, config=CONFIG, **arrays)
  np.testing.assert_array_equal(got, want)
  mask = plan_groups(q, k, config=CONFIG, lengths=lengths, segment_ids=ids).focal_mask
  plan = GroupPlan.from_focal_mask(mask, config=CONFIG, lengths=lengths, segment_ids=ids)
  out = dynamic_group_attention(q, k, k, config=CONFIG, plan=plan, segment_ids=ids, lengths=lengths)
  np.testing.assert_allclose(out, want, atol=1e-6)
