"""One attention call for all heads of a layer equals a call for each class of heads."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import DGAConfig, dynamic_group_attention, HeadBudgets, SinkWindow
from dga_jax.attention import joint_heads
from dga_jax.attention.attend_heads import prepare_setting
from dga_jax.attention.head_classes import HeadClasses
from dga_jax.attention.joint_heads import attend_jointly, attends_jointly
from dga_jax.attention.segments import find_documents
from pallas_kernels.head_range import HeadRange
from tests.nightly import nightly
from tests.pallas_kernels import h100
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

B, L, N, R, D = 2, 53, 6, 2, 16
SETTINGS = (
  "full",
  DGAConfig(
    selection="streaming",
    group_size=6,
    focal_per_block=2,
    sink_tokens=2,
    local_window=1,
    max_documents=4,
  ),
  SinkWindow(window=9, sinks=3),
  DGAConfig(
    selection="streaming",
    group_size=3,
    focal_per_block=1,
    selector="fitted",
    max_documents=4,
  ),
)
ROW = (1, 1, 0, 3, 2, 2)
IDS = np.repeat([[0, 1, -1, -1], [0, 1, 1, 2]], [20, 20, 7, 6], axis=1)
ROWS = {
  "whole": {},
  "padded": {"lengths": np.array([L, 31])},
  "packed": {"segment_ids": IDS},
}


def inputs(length=L):
  rng = np.random.default_rng(0)
  q, t = rng.normal(size=(2, B, length, N * R, D)).astype(np.float32)
  k, v = rng.normal(size=(2, B, length, N, D)).astype(np.float32)
  return (q, k, v), t, jnp.asarray(rng.normal(size=(B, length, N)), jnp.float32)


def results(op, arrays, t):
  """Output, and gradients of its inner product with t."""

  def run(arrays, t):
    out, pull = jax.vjp(op, *arrays)
    return out, *pull(t)

  return jax.jit(run)(arrays, t)


# Full heads of packed documents are always part of the call.
@pytest.mark.parametrize(
  ("rows", "full_heads_join"),
  [
    ("whole", False),
    ("whole", True),
    *nightly(("padded", False), ("padded", True)),
    ("packed", True),
  ],
)
def test_values_and_gradients_are_those_of_each_class(
  rows: str, full_heads_join: bool, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(joint_heads, "_full_heads_join", lambda *_: full_heads_join)
  arrays, t, scores = inputs()
  options = ROWS[rows]
  documents = find_documents(B, L, options.get("lengths"), options.get("segment_ids"))
  classes = HeadClasses(ROW)

  def joint(q, k, v):
    metadata = {index: prepare_setting(SETTINGS[index], documents) for index in classes.settings}
    return attend_jointly(q, k, v, classes, metadata, focal_scores=scores, implementation="xla").out

  op = functools.partial(dynamic_group_attention, focal_scores=scores, **options)
  wanted = functools.partial(op, config=HeadBudgets(SETTINGS, (ROW,)), implementation="xla")
  names = ("out", "dq", "dk", "dv")
  for name, x, y in zip(names, results(joint, arrays, t), results(wanted, arrays, t), strict=True):
    for head in range(x.shape[2]):
      assert_close(x[:, :, head], y[:, :, head], terms=L, sums=4, name=f"{name} of head {head}")


def test_documents_beyond_the_bound_of_a_setting_are_nan_in_its_heads_alone():
  (q, k, v), _, scores = inputs()
  classes = HeadClasses(ROW)
  bounded = (*SETTINGS[:3], dataclasses.replace(SETTINGS[3], max_documents=2))

  @jax.jit
  def joint(ids):
    documents = find_documents(B, L, None, ids)
    metadata = {index: prepare_setting(bounded[index], documents) for index in classes.settings}
    return attend_jointly(q, k, v, classes, metadata, focal_scores=scores, implementation="xla").out

  is_nan = np.isnan(joint(IDS)).any(axis=-1)
  expected = np.zeros_like(is_nan)
  expected[1, 47:, 3 * R : 4 * R] = True  # The third document, in the heads of SETTINGS[3].
  np.testing.assert_array_equal(is_nan, expected)


@pytest.mark.parametrize(
  ("length", "heads", "is_packed", "joins"),
  [
    (8192, 3, False, True),
    (8192, 1, False, False),  # 64 tiles of keys for 132 multiprocessors.
    (32768, 1, False, True),
    (131072, 3, False, False),
    (131072, 3, True, True),
  ],
)
def test_full_heads_join_where_their_tiles_fill_the_gpu(length, heads, is_packed, joins):
  query = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)
  ids = np.zeros((1, length), np.int32) if is_packed else None
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    documents = find_documents(1, length, None, ids)
    assert joint_heads._full_heads_join(query, HeadRange(0, heads), documents) == joins


def test_a_gpu_runs_all_heads_in_one_call_without_slices_of_them():
  budgets = HeadBudgets(SETTINGS[1:3], ((0,) * 3 + (1,) * 5,))
  q = jax.ShapeDtypeStruct((1, 512, 8, 64), jnp.bfloat16)

  def gradients(q, k, v):
    out, pull = jax.vjp(functools.partial(dynamic_group_attention, config=budgets), q, k, v)
    return pull(out)

  program = h100.lower_for_h100(gradients, q, q, q)
  for kernel in ("forward", "dq", "dkdv_focal", "dkdv_window"):
    assert f"grouped_attention_{kernel}" in program
  assert program.count("custom_call @mosaic_gpu_v2") == 4
  # No class of heads (3 and 5 of 8) is copied out of an array of all tokens, or joined.
  assert not re.search(r"tensor<1x512x[35]x64xbf16>", program)


@pytest.mark.parametrize(
  ("row", "settings", "implementation"),
  [
    ((0, 1, 0), SETTINGS, None),  # The heads of a setting are apart.
    ((1, 1, 1), SETTINGS, None),  # One class needs no slices.
    ((0, 1, 1), SETTINGS, "xla"),
    (
      (0, 1, 1),
      (
        "full",
        DGAConfig(selection="streaming", group_size=4, group_logit_bias="log_size"),
      ),
      None,
    ),
  ],
)
def test_other_calls_run_class_by_class(row, settings, implementation):
  q = jnp.zeros((1, 64, 3, 64), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(h100.abstract_mesh()):
    assert attends_jointly(q, HeadClasses((0, 1, 1)), SETTINGS)
    assert not attends_jointly(q, HeadClasses(row), settings, implementation)
  assert not attends_jointly(q, HeadClasses((0, 1, 1)), SETTINGS)  # On this CPU.
