"""benchmarks/_model_inputs.py: the heads of the chosen layers, of the tokens alone."""

import jax
import numpy as np
from flax import nnx

from benchmarks._inputs import load_inputs, repeat_to, Shape
from benchmarks._model_inputs import attention_inputs
from dga_jax.model import Decoder
from tests.dga_jax.evaluation import tiny


def _model() -> Decoder:
  return Decoder(tiny.CONFIG, rngs=nnx.Rngs(0))


def test_layers_are_side_by_side_in_the_given_order():
  tokens, config = np.arange(20) % 7, tiny.CONFIG
  both, first = (attention_inputs(_model(), tokens, layers) for layers in ([1, 0], [0]))
  for name, heads in (
    ("query", config.num_heads),
    ("key", config.num_kv_heads),
    ("value", config.num_kv_heads),
  ):
    assert both[name].shape == (20, 2 * heads, config.head_dim)
    assert both[name].dtype == np.float16
    np.testing.assert_array_equal(both[name][:, heads:], first[name])
    assert (both[name][:, :heads] != first[name]).any()


def test_later_tokens_change_no_earlier_row():
  tokens = np.arange(20) % 7
  whole, part = (attention_inputs(_model(), x, [1]) for x in (tokens, tokens[:12]))
  for name, array in part.items():
    np.testing.assert_allclose(whole[name][:12], array, atol=2e-3, err_msg=name)


def test_a_file_is_repeated_to_the_length(tmp_path):
  arrays = attention_inputs(_model(), np.arange(20) % 7, [0])
  np.savez(tmp_path / "inputs.npz", **arrays)
  loaded = load_inputs(str(tmp_path / "inputs.npz"))
  query, key, value = repeat_to(Shape(50, 1, 1, 1, dtype="float32"), loaded)
  assert query.shape == (1, 50, *arrays["query"].shape[1:])
  for x, name in ((query, "query"), (key, "key"), (value, "value")):
    np.testing.assert_array_equal(x[0, 40:], jax.numpy.asarray(arrays[name][:10], "float32"))
