"""Parameters: axis names, dtypes, gradients under remat, creation on a mesh, full-size models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from dga_jax.model import Decoder, ModelConfig, parameter_count, RopeScaling
from tests.dga_jax.model.random_decoder import abstract_decoder, random_decoder

CONFIG = ModelConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  attention="dense",
)
LLAMA2_7B = ModelConfig(
  vocab_size=32000,
  num_layers=32,
  embed_dim=4096,
  num_heads=32,
  num_kv_heads=32,
  head_dim=128,
  mlp_dim=11008,
  attention="dense",
)
LLAMA32_1B = ModelConfig(
  vocab_size=128256,
  num_layers=16,
  embed_dim=2048,
  num_heads=32,
  num_kv_heads=8,
  head_dim=64,
  mlp_dim=8192,
  rope_base=500000.0,
  rope_scaling=RopeScaling("llama3", 32.0),
  tie_embeddings=True,
  attention="dense",
)
TOKENS_BxL = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 8))


forward = nnx.jit(Decoder.__call__)


def loss(model: Decoder) -> jax.Array:
  return jax.nn.logsumexp(model(TOKENS_BxL), axis=-1).mean()


@pytest.mark.parametrize(
  ("changes", "count"),
  [
    ({}, 12),
    ({"tie_embeddings": True}, 11),
    ({"qkv_bias": True}, 15),
    ({"qk_norm": True}, 14),
    ({"focal_selector": True}, 13),
  ],
)
def test_every_parameter_names_its_axes(changes: dict, count: int) -> None:
  config = dataclasses.replace(CONFIG, **changes)
  sizes = {"layers": 2, "embed": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 24}
  sizes |= {"vocab": 32, "selector": 18}
  params = nnx.to_flat_state(nnx.state(abstract_decoder(config), nnx.Param))
  assert len(params) == count
  for path, param in params:
    names = param.get_metadata()["out_sharding"]
    assert tuple(sizes[name] for name in names) == param.shape, path
    assert ("layers" in path) == (names[0] == "layers"), path


def test_creation_under_a_mesh_with_rules() -> None:
  mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  rules = {"embed": "data", "heads": "model", "kv_heads": "model", "mlp": "model"}
  rules |= {"vocab": "model", "layers": None, "head_dim": None}

  def create() -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    with nnx.logical_axis_rules(tuple(rules.items())):
      specs = nnx.get_partition_spec(state)
    nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
    return model

  with jax.set_mesh(mesh):
    lowered = jax.jit(lambda: nnx.state(create())).lower()
    state = lowered.compile()()
  constraints = lowered.as_text()
  assert '[{"model"}, {"data"}]' in constraints  # embedding
  assert '[{}, {"data"}, {"model"}, {}]' in constraints  # query
  assert np.std(state["embedding"][...]) == pytest.approx(1, rel=0.1)


def test_a_tied_embedding_starts_at_the_scale_of_an_unembedding() -> None:
  tied = Decoder(dataclasses.replace(CONFIG, tie_embeddings=True), rngs=nnx.Rngs(0))
  assert np.std(tied.embedding[...]) == pytest.approx(CONFIG.embed_dim**-0.5, rel=0.1)


def test_master_weights_stay_float32_under_bfloat16_compute() -> None:
  model = random_decoder(CONFIG)
  gradients = nnx.jit(nnx.grad(loss))(model)
  for tree in (nnx.state(model), gradients):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
  assert nnx.eval_shape(Decoder.hidden, model, TOKENS_BxL).dtype == jnp.bfloat16
  assert model.init_cache(1, 4).layers.tokens.key.dtype == jnp.bfloat16

  exact = random_decoder(dataclasses.replace(CONFIG, dtype="float32"))
  error = np.abs(forward(model, TOKENS_BxL) - forward(exact, TOKENS_BxL)).max()
  assert 0 < error < 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_param_dtype(dtype: str) -> None:
  model = abstract_decoder(dataclasses.replace(CONFIG, param_dtype=dtype))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}


def test_remat_recomputes_and_keeps_gradients() -> None:
  gradients, products = {}, {}
  for remat in ("none", "full", "dots"):
    config = dataclasses.replace(CONFIG, dtype="float32", remat=remat)
    gradients[remat] = nnx.jit(nnx.grad(loss))(random_decoder(config))
    program = str(jax.make_jaxpr(nnx.grad(loss))(abstract_decoder(config)))
    products[remat] = program.count("dot_general[")
  for gradient in jax.tree.leaves(gradients["none"]):
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
  for remat in ("full", "dots"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
      gradients["none"],
      gradients[remat],
    )
  # A layer has 7 products with weights, of which the backward pass does not need the last one's
  # result, and 2 products in attention.
  assert products["dots"] == products["none"] + 2
  assert products["full"] == products["none"] + 8


def test_unrolled_layers_keep_gradients_and_have_no_loop() -> None:
  gradients, loops = {}, {}
  for unroll in (False, True):
    config = dataclasses.replace(CONFIG, dtype="float32", attention="dense", unroll_layers=unroll)
    gradient, model = jax.jit(nnx.grad(loss)), random_decoder(config)
    gradients[unroll] = gradient(model)
    loops[unroll] = gradient.lower(model).as_text().count("stablehlo.while")
  assert loops == {False: 2, True: 0}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
    gradients[False],
    gradients[True],
  )


def test_unrolled_layers_recompute_what_remat_drops() -> None:
  flops = {}
  for remat in ("none", "full"):
    config = dataclasses.replace(
      CONFIG, dtype="float32", attention="dense", unroll_layers=True, remat=remat
    )
    program = jax.jit(nnx.grad(loss)).lower(random_decoder(config)).compile()
    flops[remat] = program.cost_analysis()["flops"]
  # XLA has not merged the recomputation with the forward pass.
  assert flops["full"] > 1.15 * flops["none"], flops


def test_llama2_7b_shapes() -> None:
  assert parameter_count(LLAMA2_7B) == 6_738_415_616
  model = abstract_decoder(LLAMA2_7B)
  tokens_BxL = jnp.zeros((2, 4096), jnp.int32)
  logits = nnx.eval_shape(lambda model: model(tokens_BxL), model)
  assert (logits.shape, logits.dtype) == ((2, 4096, 32000), jnp.float32)

  def generate(model: Decoder) -> tuple:
    _, cache = model.prefill(tokens_BxL, jnp.full(2, 4000), max_length=4096)
    return model.decode(jnp.zeros(2, jnp.int32), cache)

  logits, cache = nnx.eval_shape(generate, model)
  assert logits.shape == (2, 32000)
  # Keys and values of 2 sequences of 4096 tokens, 32 layers and 4096 channels in 16 bit take 4 GiB.
  bytes_ = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
  assert bytes_ == 4 * 2**30 + 32 * 2 * 4


def test_llama32_1b_shapes() -> None:
  assert parameter_count(LLAMA32_1B) == 1_235_814_400


def test_program_does_not_grow_with_depth() -> None:
  def size(num_layers: int) -> int:
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    model = abstract_decoder(config)
    structure, state = nnx.split(model)
    program = jax.make_jaxpr(lambda state: nnx.merge(structure, state)(TOKENS_BxL))(state)
    return str(program).count("dot_general[")

  assert size(2) == size(32)
