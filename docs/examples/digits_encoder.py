"""An encoder with bidirectional DGA: classifies handwritten digits as sequences of pixels.

Command: `pip install scikit-learn && python docs/examples/digits_encoder.py`

The 8×8 images of scikit-learn are sequences of 64 tokens. Dense attention and
`DGAConfig(causal=False)` are trained with the same steps and seeds. A query of DGA sees 16 focal
tokens, 7 groups and 6 raw tokens of 64. With three seeds dense attention reaches 94.5 % of 360
held-out images and DGA 95.8 %, in 151 seconds on 16 CPU cores (jax 0.11.2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dga_jax import DGAConfig
from dga_jax.flax import attention_fn

WIDTH, HEADS, LAYERS, CLASSES, BATCH = 64, 4, 2, 10, 64
CONFIG = DGAConfig(causal=False, selection="streaming", group_size=6, focal_per_block=2)
ATTENTION: dict[str, Callable[..., Array]] = {
  "dense": nnx.dot_product_attention,
  "dga": attention_fn(CONFIG),
}


class Layer(nnx.Module):
  """Attention and an MLP, each after a LayerNorm and around a residual."""

  def __init__(self, attention: Callable[..., Array], *, rngs: nnx.Rngs) -> None:
    self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
    self.attention = nnx.MultiHeadAttention(
      HEADS, WIDTH, attention_fn=attention, decode=False, rngs=rngs
    )
    self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
    self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x_BxLxE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    """The states after the layer."""
    x_BxLxE = x_BxLxE + self.attention(self.norms[0](x_BxLxE))
    return x_BxLxE + self.down(nnx.gelu(self.up(self.norms[1](x_BxLxE))))


class Encoder(nnx.Module):
  """Pixels with learned positions, layers, the mean over positions, class logits."""

  def __init__(self, attention: Callable[..., Array], length: int, *, rngs: nnx.Rngs) -> None:
    self.pixel = nnx.Linear(1, WIDTH, rngs=rngs)
    self.position = nnx.Param(0.5 * rngs.params.normal((length, WIDTH)))
    self.layers = nnx.List([Layer(attention, rngs=rngs) for _ in range(LAYERS)])
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, pixels_BxL: Float[Array, "B L"]) -> Float[Array, "B C"]:
    """The logits of each class."""
    x_BxLxE = self.pixel(pixels_BxL[..., None]) + self.position[None]
    for layer in self.layers:
      x_BxLxE = layer(x_BxLxE)
    return self.head(self.norm(x_BxLxE).mean(axis=1))


@nnx.jit
def step(
  model: Encoder, optimizer: nnx.Optimizer, pixels: Float[Array, "B L"], labels: Int[Array, "B"]
) -> Float[Array, ""]:
  """One step of AdamW; returns the loss."""

  def loss(model: Encoder) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(pixels), labels).mean()

  value, gradients = nnx.value_and_grad(loss)(model)
  optimizer.update(model, gradients)
  return value


@nnx.jit
def classify(model: Encoder, pixels: Float[Array, "B L"]) -> Int[Array, "B"]:
  """The most likely class of each row."""
  return model(pixels).argmax(axis=-1)


def train(
  attention: Callable[..., Array],
  pixels: Float[np.ndarray, "S L"],
  labels: Int[np.ndarray, "S"],
  *,
  steps: int,
  seed: int,
) -> Encoder:
  """An encoder after `steps` batches drawn without replacement within an epoch."""
  model = Encoder(attention, pixels.shape[1], rngs=nnx.Rngs(seed))
  schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 10, steps)
  optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
  random = np.random.default_rng(seed)
  epochs = -(-steps // (len(labels) // BATCH))
  order = [random.permutation(len(labels)) for _ in range(epochs)]
  batches = np.concatenate([x[: len(x) // BATCH * BATCH] for x in order]).reshape(-1, BATCH)
  for batch in batches[:steps]:
    step(model, optimizer, jnp.asarray(pixels[batch]), jnp.asarray(labels[batch]))
  return model


def main(steps: int = 300, seeds: int = 3) -> None:
  """Prints the accuracy on held-out images of each kind of attention."""
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  pixels = images / 8 - 1
  order = np.random.default_rng(0).permutation(len(labels))
  held_out, trained = order[:360], order[360:]
  for name, attention in ATTENTION.items():
    accuracies = []
    for seed in range(seeds):
      data = pixels[trained].astype(np.float32), labels[trained]
      model = train(attention, *data, steps=steps, seed=seed)
      found = classify(model, jnp.asarray(pixels[held_out], jnp.float32))
      accuracies.append(float((np.asarray(found) == labels[held_out]).mean()))
    each = " ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    print(f"{name}: accuracy {np.mean(accuracies):.1%} of {len(held_out)} images ({each})")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
