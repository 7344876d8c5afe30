"""GGUF files that the tests write: weights, quantization, RoPE, and files that are refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from dga_jax.checkpoint import load_model
from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.gguf_file import GGUFFile, half_split
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_model, import_params, open_source
from dga_jax.conversion.param_map import tensor_specs
from dga_jax.model import Decoder, ModelConfig, RopeScaling
from dga_jax.model.rope import inverse_frequencies
from tests.dga_jax.conversion.gguf_files import (
  ARCHITECTURES,
  GOLDEN,
  interleaved,
  stored_tensors,
  write,
)

forward = nnx.jit(Decoder.__call__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, dict, Path]:
  config = HuggingFaceFolder(GOLDEN / "mistral").config()
  tensors = stored_tensors("mistral", config)
  path = write(tmp_path_factory.mktemp("gguf") / "model.gguf", config, tensors)
  return config, tensors, path


def import_file(path: Path, workdir: Path, **flags: Any) -> None:
  source = open_source(path, **flags)
  import_model(source, source.config(), workdir)


def rope_factors(config: ModelConfig) -> np.ndarray:
  plain, scaled = (
    inverse_frequencies(config.head_dim, base=config.rope_base, scaling=scaling)
    for scaling in (None, config.rope_scaling)
  )
  return (plain / scaled).astype(np.float32)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_logits_and_tokens_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
  config = HuggingFaceFolder(GOLDEN / family).config()
  tensors = stored_tensors(family, config)
  path = write(tmp_path / "model.gguf", config, tensors, architecture=ARCHITECTURES[family])
  import_file(path, tmp_path / "run")
  model, got, tokenizer = load_model(tmp_path / "run")
  assert (got.norm_eps, got.rope_base) == (config.norm_eps, config.rope_base)
  assert (got.attention, got.param_dtype) == (config.attention, "float32")
  expected = np.load(GOLDEN / family / "expected.npz")
  np.testing.assert_allclose(forward(model, expected["tokens"]), expected["logits"], atol=1e-3)

  text = np.load(GOLDEN / "smollm" / "expected.npz")
  ids = [*tokenizer.start_ids, *tokenizer.encode(str(text["text"]))]
  assert ids == text["text_ids"].tolist()
  assert tokenizer.end_token == "<end>"


def test_llama3_scaling_is_derived_from_its_factors(tmp_path: Path) -> None:
  """A file lacks the original context length, so the reader assumes that of LLaMA 3.1."""
  config = dataclasses.replace(
    HuggingFaceFolder(GOLDEN / "llama3").config(),
    rope_base=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0),
  )
  tensors = stored_tensors("llama3", config)
  factors = rope_factors(config)
  assert len(set(factors.tolist())) > 2
  path = write(tmp_path / "a.gguf", config, tensors | {"rope_freqs.weight": factors})
  assert GGUFFile(path).config().rope_scaling == config.rope_scaling
  wrong = factors * np.linspace(1, 1.1, len(factors), dtype=np.float32)
  for name, other in {
    "b": wrong,
    "c": factors[:-1],
    "d": np.full_like(factors, np.nan),
    "e": factors / 100,
  }.items():
    path = write(tmp_path / f"{name}.gguf", config, tensors | {"rope_freqs.weight": other})
    with pytest.raises(ConversionError, match=r"rope_freqs\.weight (does not hold|is \[3\])"):
      GGUFFile(path).config()


@pytest.mark.parametrize(
  ("changes", "factor"),
  [
    ({"llama.rope.scale_linear": 4.0}, 4.0),
    ({"llama.rope.scaling.factor": 4.0}, 4.0),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}, 2.5),
    ({"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 4.0}, 2.0),
    ({"llama.rope.scaling.type": "linear"}, 1.0),
    ({"llama.rope.scale_linear": 1.0}, 1.0),
    ({"llama.rope.scale_linear": 0.0}, 1.0),
    ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 1.0),
  ],
)
def test_linear_rope_scaling_equals_that_of_llama_cpp(
  changes: dict, factor: float, whole: Any, tmp_path: Path
) -> None:
  """A factor without a type is linear, the newer key has priority, and 0 means no scaling."""
  config, tensors, _ = whole
  path = write(tmp_path / "model.gguf", config, tensors, changes=changes)
  got = GGUFFile(path).config()
  frequencies = inverse_frequencies(8, base=got.rope_base, scaling=got.rope_scaling)
  np.testing.assert_allclose(
    frequencies, [1 / factor, 0.1 / factor, 0.01 / factor, 0.001 / factor], rtol=1e-12
  )


def test_quantized_weights_are_dequantized(tmp_path: Path) -> None:
  config = HuggingFaceFolder(GOLDEN / "mistral").config()
  tensors = stored_tensors("mistral", config)
  # Q8_0 needs rows of complete blocks of 32 values. The width of the MLP is 40.
  chosen = {name for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.shape[1] == 32}
  assert len(chosen) == 2 + 2 * 6
  path = write(tmp_path / "model.gguf", config, tensors, quantized=chosen.__contains__)
  source = GGUFFile(path)
  params = import_params(source, source.config())
  for spec in tensor_specs(config):
    ours: Any = params
    for key in spec.path:
      ours = ours[key]
    for layer in range(config.num_layers) if spec.in_layers else [None]:
      name = spec.name("gguf", layer)
      got = spec.to_stored(np.asarray(ours if layer is None else ours[layer]), config)
      if spec.path[-1] in ("query", "key"):
        got = interleaved(got, config.num_heads if spec.path[-1] == "query" else 2)
      if name not in chosen:
        np.testing.assert_array_equal(got, tensors[name])
        continue
      # Each of 32 values is an integer times a float16 step, 1/127 of the largest absolute value.
      got, want = got.reshape(-1, 32), tensors[name].reshape(-1, 32)
      step = np.float16(np.abs(want).max(1, keepdims=True) / 127).astype(np.float32)
      np.testing.assert_allclose(got / step, np.round(got / step), atol=1e-4)
      assert (np.abs(got - want) <= 0.6 * step).all(), name


def test_half_split_is_the_inverse_of_interleaving() -> None:
  weights = np.arange(24 * 3).reshape(24, 3)
  assert interleaved(weights, 3)[:4, 0].tolist() == [0, 12, 3, 15]
  np.testing.assert_array_equal(half_split(interleaved(weights, 3), 3), weights)


def test_truncated_files_are_refused(whole: Any, tmp_path: Path) -> None:
  *_, path = whole
  content = path.read_bytes()
  copy = tmp_path / "cut.gguf"
  copy.write_bytes(content[:-100])
  with pytest.raises(
    ConversionError, match=r"cut\.gguf is no whole GGUF file.*its tensor output\.weight"
  ):
    GGUFFile(copy)
  copy.write_bytes(content[: len(content) // 2])
  with pytest.raises(ConversionError, match=r"cut\.gguf is no whole GGUF file.*its tensor blk\."):
    GGUFFile(copy)
  for size in (0, 3, 20, 200, 1000):
    copy.write_bytes(content[:size])
    with pytest.raises(ConversionError, match=r"cut\.gguf is no whole GGUF file"):
      GGUFFile(copy)
  with pytest.raises(FileNotFoundError, match=r"no .*none\.gguf"):
    open_source(tmp_path / "none.gguf")


def test_a_big_endian_file_is_refused(whole: Any, tmp_path: Path) -> None:
  config, tensors, _ = whole
  path = write(tmp_path / "big.gguf", config, tensors, big_endian=True)
  with pytest.raises(ConversionError, match=r"big\.gguf is a big-endian.*gguf-convert-endian"):
    GGUFFile(path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"general.type": "adapter"}, "general.type='adapter'; only 'model'"),
    ({"general.quantization_version": 1}, "quantization_version=1; only 2"),
    ({"split.count": 2}, "split.count=2; only 1"),
    ({"clip.vision.block_count": 2}, "clip.vision.block_count', which is none of a model"),
    ({"llama.rope.scaling.type": "yarn"}, "rope type 'yarn'; supported"),
    (
      {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5},
      "factor is 0.5; it must be .*at least 1",
    ),
    ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor=1.2.*; only 1"),
    ({"llama.rope.freq_base_swa": 1e4}, "unknown key llama.rope.freq_base_swa=10000.0.*ignore"),
    ({"llama.rope.freq_bsae": 1e4}, "unknown key .* Did you mean llama.rope.freq_base?"),
    ({"llama.rope.freq_base": "1"}, "llama.rope.freq_base='1'; it must be a finite number"),
    ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4; it must be 8"),
    ({"llama.attention.value_length": 4}, "attention.value_length=4; it must be 8"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm"),
    ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv=.*the same number for each layer"),
    ({"llama.attention.causal": False}, "causal=False; only True"),
    ({"llama.attention.scale": 0.5}, "attention.scale=0.5; only 0"),
    ({"llama.attention.sliding_window_pattern": 4}, "unknown key .*sliding_window_pattern=4"),
    ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv=8.0; only 0"),
    ({"llama.expert_count": 8}, "expert_count=8; only 0"),
    ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0; only 0"),
    ({"llama.embedding_scale": 12.0}, "embedding_scale=12.0; only 0"),
    ({"llama.residual_scale": 0.2}, "residual_scale=0.2.*; only 0"),
    ({"llama.vocab_size": 65}, "llama.vocab_size=65; it must be 64"),
    ({"llama.block_count": 3}, r"lacks the tensors blk\.2\.attn_k\.weight.* and 4 more"),
    ({"llama.block_count": 10**9}, r"has 21 tensors, too few for 1000000000 layers"),
    ({"llama.feed_forward_length": 8}, r"blk\.0\.ffn_gate\.weight is \[40, 32\].*\[8, 32\]"),
    ({"tokenizer.ggml.byte_encoder": "x"}, "unknown key tokenizer.ggml.byte_encoder='x'"),
    ({"tokenizer.ggml.add_sep_token": True}, "add_sep_token=True; only False"),
  ],
)
def test_files_that_are_refused(changes: dict, message: str, whole: Any, tmp_path: Path) -> None:
  config, tensors, _ = whole
  path = write(tmp_path / "model.gguf", config, tensors, changes=changes)
  with pytest.raises(ConversionError, match=message) as error:
    import_file(path, tmp_path / "run")
  assert "model.gguf" in str(error.value)


def test_another_architecture_is_refused(whole: Any, tmp_path: Path) -> None:
  config, tensors, _ = whole
  path = write(tmp_path / "model.gguf", config, tensors, architecture="gemma")
  with pytest.raises(ConversionError, match=r"general\.architecture='gemma'; supported are llama,"):
    GGUFFile(path)


def test_keys_without_effect_are_accepted(whole: Any, tmp_path: Path) -> None:
  """Covers keys of other programs, of the file format, and of features that are switched off."""
  config, tensors, plain = whole
  changes = {
    "general.sampling.temp": 0.7,
    "mradermacher.quantized_by": "someone",
    "quantize.imatrix.chunks_count": 3,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.rope.scaling.original_context_length": 4096,
    "llama.vocab_size": 64,
    "llama.attention.causal": True,
    "llama.expert_count": 0,
    "llama.attention.head_count_kv": [config.num_kv_heads] * config.num_layers,
    "tokenizer.ggml.fim_pre_token_id": 1,
  }
  path = write(tmp_path / "model.gguf", config, tensors, changes=changes)
  assert GGUFFile(path).config() == GGUFFile(plain).config()


def test_an_unknown_key_can_be_ignored_by_name(whole: Any, tmp_path: Path) -> None:
  config, tensors, _ = whole
  path = write(tmp_path / "model.gguf", config, tensors, changes={"llama.note": "x"})
  with pytest.raises(ConversionError, match="--ignore_keys"):
    GGUFFile(path)
  assert GGUFFile(path, ["llama.note"]).config().num_layers == 2
