"""Invalid arguments of the op raise ValueError at trace time with the argument's name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import (
  DGAConfig,
  dynamic_group_attention,
  explain,
  GroupPlan,
  HeadBudgets,
  plan_groups,
)
from dga_jax.cache import attend_and_prefill, prefill
from dga_jax.flax import attention_fn

pytestmark = pytest.mark.invalid_arguments

CONFIG = DGAConfig(group_size=4, min_focal_tokens=0)
Q = jnp.zeros((2, 12, 4, 8))
K = jnp.zeros((2, 12, 2, 8))


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("group_size", 0),
    ("group_size", 2.5),
    ("importance_rate", -0.1),
    ("importance_rate", 1.01),
    ("importance_rate", float("nan")),
    ("min_focal_tokens", -1),
    ("selection", "best"),
    ("visibility", "all"),
    ("aggregation_scale", "sqrt"),
    ("group_logit_bias", 1.0),
    ("complementary", 1),
    ("sink_tokens", -4),
    ("local_window", 2),
    ("focal_per_block", 0),
    ("max_documents", 0),
    ("seed", None),
    *((name, 2**33) for name in ("group_size", "min_focal_tokens", "sink_tokens", "n_recent")),
  ],
)
def test_invalid_config_field_is_named(name, value):
  with pytest.raises(ValueError, match=name):
    DGAConfig(**{name: value})


def test_a_rate_of_almost_nothing_is_a_rate():
  assert DGAConfig(importance_rate=1e-300).focal_at_rate(np.array([0, 33])).tolist() == [0, 1]


def test_invalid_combinations_of_config_fields():
  with pytest.raises(ValueError, match="complementary"):
    DGAConfig(selection="streaming", complementary=False)
  with pytest.raises(ValueError, match="n_random"):
    DGAConfig(n_recent=0, n_random=0)
  with pytest.raises(TypeError, match="group_sise"):
    DGAConfig(group_sise=4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"query": Q[0]}, r"query has shape \(12, 4, 8\)"),
    ({"key": K[..., :4]}, "key has shape"),
    ({"key": jnp.zeros((2, 12, 3, 8)), "value": jnp.zeros((2, 12, 3, 8))}, "divide query heads"),
    ({"value": K[:, :6]}, "value has shape"),
    ({"query": Q.astype(jnp.bfloat16)}, "cast them to one dtype"),
    ({"value": K.astype(jnp.float16)}, "value is float16"),
    ({"query": Q.astype(jnp.int32)}, "query has dtype int32"),
    ({"query": Q[:, :0], "key": K[:, :0], "value": K[:, :0]}, "empty dimension"),
    ({"lengths": np.array([3, 13])}, "lengths has values from 3 to 13"),
    ({"lengths": np.array([3.0, 4.0])}, "lengths is float"),
    ({"lengths": np.array([3])}, "lengths is int"),
    ({"lengths": [3, 12.5]}, r"lengths is float64\[2\]; it must be int\[2\]"),
    ({"lengths": [3, -1]}, "lengths has values from -1 to 3"),
    ({"lengths": 12}, r"lengths is int64\[\]; it must be int\[2\]"),
    ({"segment_ids": [[0] * 12, [0] * 11]}, r"segment_ids is a ragged list; it must be int\[2, 12"),
    ({"segment_ids": np.zeros((2, 11), np.int32)}, "segment_ids is int32"),
    ({"scale": -1.0}, "scale is -1.0"),
    ({"scale": float("nan")}, "scale is nan"),
    ({"implementation": "fastest"}, "implementation is 'fastest'"),
    ({"config": None}, "config is None; it must be a DGAConfig or HeadBudgets"),
    ({"config": DGAConfig}, "config is the class DGAConfig; it must be a DGAConfig or HeadBudgets"),
    (
      {"query": Q.swapaxes(1, 2), "key": K.swapaxes(1, 2), "value": K.swapaxes(1, 2)},
      r"key has shape \(2, 2, 12, 8\).*pass jnp.swapaxes\(x, 1, 2\)",
    ),
  ],
)
def test_invalid_arguments_of_the_op(changes, message):
  arguments = {"query": Q, "key": K, "value": K, "config": CONFIG} | changes
  with pytest.raises(ValueError, match=message):
    dynamic_group_attention(**arguments)


@pytest.mark.parametrize("config", [{"group_size": 4}, HeadBudgets(("full",), ((0, 0),))])
@pytest.mark.parametrize(
  "call",
  [
    lambda config: plan_groups(Q, K, config=config),
    lambda config: GroupPlan.from_focal_mask(jnp.zeros((2, 2, 12), bool), config=config),
    lambda config: prefill(K, K, Q, config=config, max_length=20),
    lambda config: attend_and_prefill(Q, K, K, config=config, max_length=20),
    attention_fn,
  ],
)
def test_functions_of_one_setting_name_the_config(call, config):
  with pytest.raises(ValueError, match=r"config is .*; it must be a DGAConfig, for example"):
    call(config)


def test_explain_checks_as_the_op_does():
  with pytest.raises(ValueError, match="config is None; it must be a DGAConfig or HeadBudgets"):
    explain(Q, K, K, config=None)
  with pytest.raises(ValueError, match=r"query has shape \(12, 4, 8\)"):
    explain(Q[0], K[0], K[0], config=CONFIG)


def test_traced_segment_ids_need_max_documents():
  ids = np.zeros((2, 12), np.int32)
  op = jax.jit(lambda ids, c: plan_groups(Q, K, config=c, segment_ids=ids), static_argnums=1)
  with pytest.raises(ValueError, match=r"max_documents is None\. Set max_documents to the most"):
    op(ids, CONFIG)
  op(ids, dataclasses.replace(CONFIG, selection="streaming"))


@pytest.mark.parametrize("inside", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_more_documents_than_max_documents(inside):
  """Concrete segment ids are counted outside jit and, as constants, inside jit."""
  three = np.repeat([[0, 1, 2]], 2, axis=0).repeat(4, axis=1)
  two = dataclasses.replace(CONFIG, max_documents=2)
  plan = inside(lambda q: plan_groups(q, K, config=two, segment_ids=three))
  op = inside(lambda q: dynamic_group_attention(q, K, K, config=two, segment_ids=three))
  for call in (plan, op):
    with pytest.raises(ValueError, match=r"3 documents in a row.*max_documents to at least 3"):
      call(Q)


def test_concrete_segment_ids_under_jit_need_no_max_documents():
  ids = np.repeat([[0, 1, 2]], 2, axis=0).repeat(4, axis=1)
  op = jax.jit(lambda q: dynamic_group_attention(q, K, K, config=CONFIG, segment_ids=ids))
  assert op(Q).shape == Q.shape


def test_a_plan_must_match_the_call():
  plan = plan_groups(Q, K, config=CONFIG)
  other = dataclasses.replace(CONFIG, group_size=3)
  with pytest.raises(ValueError, match="made with group_size=4, and config has group_size=3"):
    dynamic_group_attention(Q, K, K, config=other, plan=plan)
  with pytest.raises(ValueError, match=r"plan\.focal_mask has shape"):
    dynamic_group_attention(Q[:, :6], K[:, :6], K[:, :6], config=CONFIG, plan=plan)
  with pytest.raises(ValueError, match="plan was made for other lengths"):
    dynamic_group_attention(Q, K, K, config=CONFIG, plan=plan, lengths=np.array([3, 4]))


def test_invalid_focal_masks():
  with pytest.raises(ValueError, match="focal_mask is float32"):
    GroupPlan.from_focal_mask(jnp.zeros((1, 1, 5)), config=CONFIG)
  mask = jnp.ones((1, 1, 12), bool)
  with pytest.raises(ValueError, match="has 12 focal tokens in a row and KV head; max_focal is 3"):
    GroupPlan.from_focal_mask(mask, config=CONFIG, max_focal=3)
  streaming = dataclasses.replace(CONFIG, selection="streaming")
  with pytest.raises(ValueError, match=r"has \[5\] focal tokens by KV head in the block at row 0"):
    GroupPlan.from_focal_mask(mask, config=streaming)
