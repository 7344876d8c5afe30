"""Forms of the selector beyond `dga_jax.model.focal_selector`: more features, an MLP, another loss.

A form scores a token from features of its own KV head (key before RoPE, value, both norms) and from
features that all heads share: the layer's normalised input, and the token's place in its block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from benchmarks._forward import embed
from benchmarks._selector_choices import value_distance, value_size
from dga_jax.calibration.selector_fit import attend_and_rate, beyond_window, FitBlocks
from dga_jax.calibration.selector_loss import BATCH_TOKENS
from dga_jax.config import DGAConfig
from dga_jax.model import Decoder
from dga_jax.model.focal_selector import features, selector_features
from dga_jax.model.layers import DecoderLayer
from dga_jax.model.rope import apply_rope, rope_table, RopeTable

MLP_WIDTH = 32
_PLACES = 3


class Inputs(NamedTuple):
  """Features of g blocks of s tokens; a leading axis of layers or none."""

  own: Float[Array, "*K N g s S"]
  shared: Float[Array, "*K g s U"]
  target: Float[Array, "*K N g s"]  # Logarithm of the mean attention beyond the raw window.
  value_size: Float[Array, "*K N g s"]  # log ‖v‖
  value_distance: Float[Array, "*K N g s"]  # log ‖v − v̄‖, with the block's mean v̄


class Form(NamedTuple):
  """Weights: score = own·x + shared·u + outer·gelu(inner·[x, u] + bias); leading axis as above."""

  own: Float[Array, "*K N S"]
  shared: Float[Array, "*K N U"]
  inner_own: Float[Array, "*K N S M"]
  inner_shared: Float[Array, "*K N U M"]
  bias: Float[Array, "*K N M"]
  outer: Float[Array, "*K N M"]


def shared_features(
  normed_BxLxE: Float[Array, "B L E"], config: DGAConfig
) -> Float[Array, "B L U"]:
  """The layer's normalised input, then the place in the block: x, x² and a logarithm.

  x is the offset in the block over its size s. The logarithm is log(s − offset)/log s. Sinks get
  the places of the last tokens of a block.
  """
  B, L, _ = normed_BxLxE.shape
  s = config.block_size
  offset_L = (np.arange(L) - config.sink_tokens) % s
  x_L, left_L = offset_L / s, np.log(s - offset_L) / np.log(s)
  places = jnp.asarray(np.stack([x_L, x_L**2, left_L], axis=-1), jnp.float32)
  places_BxLx3 = jnp.broadcast_to(places[None], (B, L, _PLACES))
  return jnp.concatenate([normed_BxLxE.astype(jnp.float32), places_BxLx3], axis=-1)


def score(
  form: Form, own: Float[Array, "N g s S"], shared: Float[Array, "g s U"]
) -> Float[Array, "N g s"]:
  """The scores of one layer's tokens, see `Form`."""
  # A GPU multiplies float32 matrices in fewer bits by default.
  einsum = functools.partial(jnp.einsum, precision="highest")
  own, shared = own.astype(jnp.float32), shared.astype(jnp.float32)
  linear = einsum("ngtx,nx->ngt", own, form.own)
  linear += einsum("gtu,nu->ngt", shared, form.shared)
  inner = einsum("ngtx,nxm->ngtm", own, form.inner_own)
  inner += einsum("gtu,num->ngtm", shared, form.inner_shared)
  inner = jax.nn.gelu(inner + form.bias[:, None, None])
  return linear + einsum("ngtm,nm->ngt", inner, form.outer)


def linear_form(own_KxNxS: Array, shared_KxNxU: Array) -> Form:
  """A form whose MLP adds nothing."""
  (K, N, S), U, M = own_KxNxS.shape, shared_KxNxU.shape[-1], MLP_WIDTH
  inner, narrow = jnp.zeros((K, N, S, M)), jnp.zeros((K, N, M))
  return Form(own_KxNxS, shared_KxNxU, inner, jnp.zeros((K, N, U, M)), narrow, narrow)


def sizes(model: Decoder) -> tuple[int, int]:
  """S and U, the numbers of features."""
  return selector_features(model.config.head_dim), model.config.embed_dim + _PLACES


def scan_layers(model: Decoder, x_BxLxE: Array, attend: Any, extra: Any) -> tuple[Array, Any]:
  """As `_forward.run_layers`, for an `attend` that also sees the layer's normalised input.

  Args:
    model: with stacked layers.
    x_BxLxE: the input of the first layer.
    attend: (query, key, value, normalised input, layer's index, its part of `extra`, rope) to the
      output and what is stacked over layers.
    extra: arrays with a leading axis of layers.
  """
  L = x_BxLxE.shape[1]
  rope = rope_table(jnp.arange(L)[None], model.config.rope_frequencies())
  assert isinstance(model.layers, DecoderLayer)  # The layers are stacked.
  structure, stacked = nnx.split(model.layers)

  def step(x_BxLxE: Array, xs: Any) -> tuple[Array, Any]:
    params, layer, own = xs
    one = nnx.merge(structure, params)
    normed_BxLxE = one.attention_norm(x_BxLxE).astype(one.dtype)
    return one(x_BxLxE, rope, lambda q, k, v, *_: attend(q, k, v, normed_BxLxE, layer, own, rope))

  layers = jnp.arange(model.config.num_layers)
  x_BxLxE, by_layer = jax.lax.scan(step, x_BxLxE, (stacked, layers, extra))
  return model.norm(x_BxLxE).astype(model.config.dtype), by_layer


def own_features(k_BxLxNxD: Array, v_BxLxNxD: Array, rope: RopeTable) -> Float[Array, "B L N S"]:
  """The features of `focal_selector`, from keys after RoPE."""
  return features(
    apply_rope(k_BxLxNxD.astype(jnp.float32), RopeTable(rope.cos, -rope.sin)), v_BxLxNxD
  )


@functools.partial(jax.jit, static_argnums=(0, 2))
def collect(
  graphdef: nnx.GraphDef, params: Any, config: DGAConfig, tokens_BxL: Int[Array, "B L"]
) -> Inputs:
  """The inputs of all layers under dense attention; `shared` is stored in bfloat16."""
  model: Decoder = nnx.merge(graphdef, params)
  L = tokens_BxL.shape[1]
  blocks = FitBlocks.of_row(L, config)
  inside = slice(blocks.start, blocks.start + blocks.blocks * blocks.size)

  def attend(
    q: Array, k: Array, v: Array, normed: Array, layer: Array, own: None, rope: RopeTable
  ) -> Any:
    out, rated_BxLxN = attend_and_rate(q, k, v, beyond_window(L, blocks))
    own_BxLxNxS, shared_BxLxU = own_features(k, v, rope), shared_features(normed, config)

    def by_block(x: Array) -> Array:
      x = x[:, inside]
      return x.reshape(-1, blocks.size, *x.shape[2:])

    return out, Inputs(
      jnp.moveaxis(by_block(own_BxLxNxS), 2, 0),
      by_block(shared_BxLxU.astype(jnp.bfloat16)),
      jnp.moveaxis(by_block(rated_BxLxN), 2, 0),
      jnp.moveaxis(by_block(value_size(v, config)), 2, 0),
      jnp.moveaxis(by_block(value_distance(v, config)), 2, 0),
    )

  def of_row(row_L: Array) -> Inputs:
    inputs: Inputs = scan_layers(model, embed(model, row_L[None]), attend, None)[1]
    return inputs

  rows = jax.lax.map(of_row, tokens_BxL)

  def join(x: Array, axis: int) -> Array:
    """Moves the axis of rows before the axis of blocks, and joins the two."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  own, shared, *of_tokens = rows
  return Inputs(join(own, 2), join(shared, 1), *(join(x, 2) for x in of_tokens))


@jax.jit
def fit_ridge(inputs: Inputs, used: Float[Array, "U"], ridge: Float[Array, ""]) -> Form:
  """Ridge regression of the centred target.

  Without shared features this is the start of `fit_selector`: `ridge` is a share of the mean
  diagonal of the normal equations. Each shared feature is divided by its standard deviation.

  Args:
    inputs: of all layers.
    used: 1 for a shared feature that the form uses, else 0.
    ridge: added to the diagonal.
  """

  def of_layer(inputs: Inputs) -> tuple[Array, Array]:
    N, g, s, S = inputs.own.shape
    shared = _centred(inputs.shared.astype(jnp.float32) * used[None, None], 1).reshape(1, g * s, -1)
    own = _centred(inputs.own, 2).reshape(N, g * s, S)
    x = jnp.concatenate([own, jnp.broadcast_to(shared, (N, *shared.shape[1:]))], axis=-1)
    square = jnp.square(x).mean(axis=1)
    square = square.at[:, :S].set(square[:, :S].mean(axis=1, keepdims=True))
    scale = jnp.where(square > 0, jnp.sqrt(square), 1.0)
    x = x / scale[:, None]
    y = _centred(inputs.target, 2).reshape(N, g * s)
    gram = jnp.einsum("ntx,ntz->nxz", x, x, precision="highest") / (g * s)
    moment = jnp.einsum("ntx,nt->nx", x, y, precision="highest") / (g * s)
    weights = jnp.linalg.solve(gram + ridge * jnp.eye(gram.shape[-1])[None], moment[..., None])
    weights = weights[..., 0] / scale
    return weights[:, :S], weights[:, S:]

  return linear_form(*jax.lax.map(of_layer, inputs))


@functools.partial(jax.jit, static_argnames="steps")
def fit_listwise(
  start: Form,
  inputs: Inputs,
  used: Float[Array, "U"],
  *,
  mlp: bool | Bool[Array, ""],
  steps: int,
  learning_rate: float,
  decay: float,
) -> Form:
  """Minimises the cross entropy of a block's attention and the softmax of its scores (ListNet).

  Without shared features and MLP this is the rule of `fit_selector`. Adam with a cosine schedule on
  standardised features.

  Args:
    start: a linear form.
    inputs: of all layers.
    used: 1 for a shared feature that the form uses, else 0.
    mlp: whether the MLP is fitted too; else its output is 0.
    steps: of Adam, of 16384 tokens each.
    learning_rate: of the first step.
    decay: of the squared weights of the shared features and the MLP.
  """

  def of_layer(start: Form, inputs: Inputs) -> Form:
    own_mean, own_std = _moments(inputs.own, 2)
    shared_mean, shared_std = _moments(inputs.shared, 1)
    form = _random_mlp(start)._replace(
      own=start.own * own_std, shared=start.shared * shared_std[None]
    )
    fitted = _minimise(
      form, inputs, used, (own_mean, own_std, shared_mean, shared_std), mlp, steps, learning_rate,
      decay,
    )  # fmt: skip
    inner_own = fitted.inner_own / own_std[..., None]
    # The inner weights of unused features are still the random ones.
    inner_shared = fitted.inner_shared * (used / shared_std)[None, :, None]
    moved = jnp.einsum("nx,nxm->nm", own_mean, inner_own)
    moved += jnp.einsum("u,num->nm", shared_mean, inner_shared)
    return Form(
      fitted.own / own_std,
      fitted.shared / shared_std[None],
      inner_own,
      inner_shared,
      fitted.bias - moved,
      fitted.outer,
    )

  result: Form = jax.lax.map(lambda xs: of_layer(*xs), (start, inputs))
  return result


def _minimise(
  form: Form,
  inputs: Inputs,
  used: Array,
  moments: tuple[Array, Array, Array, Array],
  mlp: bool | Array,
  steps: int,
  learning_rate: float,
  decay: float,
) -> Form:
  own_mean, own_std, shared_mean, shared_std = moments
  g, s = inputs.own.shape[1:3]
  count = max(1, min(g, BATCH_TOKENS // s))
  optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))
  on = jnp.asarray(mlp, jnp.float32)
  varies = Form(jnp.float32(1), used[None], on, on * used[None, :, None], on, on)

  def loss(form: Form, batch: Inputs) -> Array:
    own = (batch.own.astype(jnp.float32) - own_mean[:, None, None]) / own_std[:, None, None]
    shared = (batch.shared.astype(jnp.float32) - shared_mean[None, None]) / shared_std[None, None]
    logs = jax.nn.log_softmax(score(form, own, shared * used[None, None]), axis=-1)
    entropy = -(jax.nn.softmax(batch.target, axis=-1) * logs).sum(axis=-1).mean(axis=-1).sum()
    wide = (form.shared, form.inner_own, form.inner_shared)
    return entropy + decay * sum(jnp.square(x).sum() for x in wide)

  def step(carry: Any, key: Array) -> tuple[Any, None]:
    form, state = carry
    chosen = jax.random.randint(key, (count,), 0, g)
    batch = inputs._replace(
      own=inputs.own[:, chosen], shared=inputs.shared[chosen], target=inputs.target[:, chosen]
    )
    gradients = jax.tree.map(jnp.multiply, jax.grad(loss)(form, batch), varies)
    updates, state = optimizer.update(gradients, state)
    updates = jax.tree.map(lambda x: learning_rate * x, updates)
    return (optax.apply_updates(form, updates), state), None

  keys = jax.random.split(jax.random.key(0), steps)
  fitted: Form = jax.lax.scan(step, (form, optimizer.init(form)), keys)[0][0]
  return fitted


def _random_mlp(form: Form) -> Form:
  """The form with random inner weights; the MLP's output is 0."""
  first, second = jax.random.split(jax.random.key(1))
  S, U = form.own.shape[-1], form.shared.shape[-1]
  return form._replace(
    inner_own=jax.random.normal(first, form.inner_own.shape) * S**-0.5,
    inner_shared=jax.random.normal(second, form.inner_shared.shape) * U**-0.5,
  )


def _centred(x: Array, axis: int) -> Array:
  return x - x.mean(axis=axis, keepdims=True)


def _moments(x: Array, axis: int) -> tuple[Array, Array]:
  """Mean and standard deviation over the axes of blocks and tokens, `axis` − 1 and `axis`."""
  wide = x.astype(jnp.float32)
  axes = (axis - 1, axis)
  deviation = wide.std(axis=axes)
  return wide.mean(axis=axes), jnp.where(deviation > 0, deviation, 1.0)
