"""GGUF files written here: weights, quantized weights, RoPE's form, tokenizers, and defects."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from dga_jax.checkpoint import load_model
from dga_jax.conversion.gguf_file import GGUFFile, half_split
from dga_jax.conversion.gguf_tokenizer import tokenizer_from_metadata
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_model, import_params, open_source
from dga_jax.conversion.param_map import tensor_specs
from dga_jax.model import Decoder, ModelConfig, RopeScaling
from dga_jax.model.rope import inverse_frequencies

GOLDEN = Path(__file__).parents[2] / "golden" / "hugging_face"
ARCHITECTURES = {"llama3": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
forward = nnx.jit(Decoder.__call__)


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
  """Channels c and c + D/2 of each head become rows 2c and 2c + 1."""
  D = len(weights) // heads
  rows = [h * D + c + half for h in range(heads) for c in range(D // 2) for half in (0, D // 2)]
  return weights[rows]


def stored_tensors(family: str, config: ModelConfig) -> dict[str, np.ndarray]:
  """A fixture's tensors by their names in GGUF, float32, as llama.cpp's converter lays them out."""
  folder = GOLDEN / family
  ours = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
  found = {}
  for spec in tensor_specs(config):
    for layer in range(config.num_layers) if spec.in_layers else [None]:
      tensor = ours[spec.name("hugging_face", layer)].astype(np.float32)
      if ARCHITECTURES[family] == "llama" and spec.path[-1] in ("query", "key"):
        heads = config.num_heads if spec.path[-1] == "query" else config.num_kv_heads
        tensor = interleaved(tensor, heads)
      found[spec.name("gguf", layer)] = tensor
  return found


def write(
  path: Path,
  config: ModelConfig,
  tensors: Mapping[str, np.ndarray],
  *,
  architecture: str = "llama",
  quantized: Callable[[str], bool] = lambda name: False,
  **changes: Any,
) -> Path:
  """A GGUF file; `changes` are metadata, with "__" for a dot, and None leaves a key out."""
  values = {
    f"{architecture}.block_count": config.num_layers,
    f"{architecture}.context_length": 64,
    f"{architecture}.embedding_length": config.embed_dim,
    f"{architecture}.feed_forward_length": config.mlp_dim,
    f"{architecture}.attention.head_count": config.num_heads,
    f"{architecture}.attention.head_count_kv": config.num_kv_heads,
    f"{architecture}.attention.key_length": config.head_dim,
    f"{architecture}.rope.freq_base": config.rope_base,
    f"{architecture}.attention.layer_norm_rms_epsilon": config.norm_eps,
  }
  if config.attention == "sliding_window":
    values[f"{architecture}.attention.sliding_window"] = config.sliding_window.window
  values |= {key.replace("__", "."): value for key, value in changes.items()}
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in values.items():
    if isinstance(value, str):
      writer.add_string(key, value)
    elif isinstance(value, list):
      writer.add_array(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif value is not None:
      writer.add_uint32(key, value)
  add_tokenizer(writer)
  for name, tensor in tensors.items():
    kind = Q8_0 if quantized(name) else F32
    writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
  """The byte-level tokenizer of the fixtures."""
  model = json.loads((GOLDEN / "smollm" / "tokenizer.json").read_text())["model"]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
  writer.add_token_types([3] * 4 + [1] * (len(model["vocab"]) - 4))
  writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
  writer.add_add_bos_token(True)
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(2)


def import_file(path: Path, workdir: Path) -> None:
  source = open_source(path)
  import_model(source, source.config(), workdir)


def rope_factors(config: ModelConfig) -> np.ndarray:
  plain, scaled = (
    inverse_frequencies(config.head_dim, base=config.rope_base, scaling=scaling)
    for scaling in (None, config.rope_scaling)
  )
  return (plain / scaled).astype(np.float32)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_logits_and_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
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


def test_scaled_rope_is_read_off_its_factors(tmp_path: Path) -> None:
  """Files do not say the context before stretching; LLaMA 3.1's is the one that is known."""
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
  path = write(tmp_path / "b.gguf", config, tensors | {"rope_freqs.weight": wrong})
  with pytest.raises(ValueError, match=r"rope_freqs\.weight does not hold LLaMA 3's"):
    GGUFFile(path).config()


def test_quantized_weights_are_dequantized(tmp_path: Path) -> None:
  config = HuggingFaceFolder(GOLDEN / "mistral").config()
  tensors = stored_tensors("mistral", config)
  # Q8_0 takes rows of whole blocks of 32; the MLP's width is 40.
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
      # 32 values are whole steps of 1/127 of the largest; the step itself is stored in 16 bit.
      got, want = got.reshape(-1, 32), tensors[name].reshape(-1, 32)
      step = np.float16(np.abs(want).max(1, keepdims=True) / 127).astype(np.float32)
      np.testing.assert_allclose(got / step, np.round(got / step), atol=1e-4)
      assert (np.abs(got - want) <= 0.6 * step).all(), name


def test_half_split_undoes_interleaving() -> None:
  weights = np.arange(24 * 3).reshape(24, 3)
  assert interleaved(weights, 3)[:4, 0].tolist() == [0, 12, 3, 15]
  np.testing.assert_array_equal(half_split(interleaved(weights, 3), 3), weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, dict, Path]:
  config = HuggingFaceFolder(GOLDEN / "mistral").config()
  tensors = stored_tensors("mistral", config)
  path = write(tmp_path_factory.mktemp("gguf") / "model.gguf", config, tensors)
  return config, tensors, path


def test_truncated_files(whole: Any, tmp_path: Path) -> None:
  *_, path = whole
  content = path.read_bytes()
  copy = tmp_path / "cut.gguf"
  copy.write_bytes(content[:-100])
  with pytest.raises(
    ValueError, match=r"cut\.gguf is no whole GGUF file.*its tensor output\.weight"
  ):
    GGUFFile(copy)
  copy.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match=r"cut\.gguf is no whole GGUF file.*its tensor blk\."):
    GGUFFile(copy)
  for size in (0, 3, 20, 200, 1000):
    copy.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"cut\.gguf is no whole GGUF file"):
      GGUFFile(copy)
  with pytest.raises(FileNotFoundError, match=r"no .*none\.gguf"):
    open_source(tmp_path / "none.gguf")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architecture": "gemma"}, "general.architecture='gemma'; supported are llama, qwen2, qwen3"),
    ({"llama__rope__scaling__type": "yarn"}, "rope type 'yarn'; supported"),
    ({"llama__attention__layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm"),
    ({"llama__attention__head_count_kv": [2, 1]}, "head_count_kv for each layer"),
    ({"llama__rope__dimension_count": 4}, "rope.dimension_count=4; only 8"),
    ({"split__count": 2}, "one of 2 parts"),
    ({"llama__block_count": 3}, r"lacks the tensors blk\.2\.attn_k\.weight.* and 4 more"),
    ({"llama__feed_forward_length": 8}, r"blk\.0\.ffn_gate\.weight is \[40, 32\].*\[8, 32\]"),
  ],
)
def test_files_that_are_refused(changes: dict, message: str, whole: Any, tmp_path: Path) -> None:
  config, tensors, _ = whole
  path = write(tmp_path / "model.gguf", config, tensors, **changes)
  with pytest.raises(ValueError, match=message):
    import_file(path, tmp_path / "run")


def metadata(**changes: Any) -> dict[str, Any]:
  """A tokenizer of single bytes and a few merges."""
  letters = pre_tokenizers.ByteLevel.alphabet()
  tokens = ["<end>", *sorted(letters), "12", "Ġx", "12x"]
  values = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": tokens,
    "token_type": [3, *[1] * (len(tokens) - 1)],
    "merges": ["1 2", "Ġ x"],
    "eos_token_id": 0,
    "bos_token_id": 0,
    "add_bos_token": False,
  }
  return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items()}


@pytest.mark.parametrize(
  ("pre", "text", "words"),
  [
    ("gpt-2", "12 x", ["12", "Ġx"]),
    ("smollm", "12 x", ["1", "2", "Ġx"]),
    ("qwen2", "12 x", ["1", "2", "Ġx"]),
    ("qwen2", "e\u0301", ["Ã", "©"]),
    ("llama-bpe", "12 x", ["12", "Ġx"]),
    ("llama-bpe", "0012", ["0", "0", "1", "2"]),
    ("llama-bpe", "12x", ["12", "x"]),
  ],
)
def test_words_before_merges(pre: str, text: str, words: list[str]) -> None:
  tokenizer = tokenizer_from_metadata(metadata(pre=pre), None)
  tokens = metadata(pre=pre)["tokenizer.ggml.tokens"]
  assert [tokens[index] for index in tokenizer.encode(text)] == words
  assert tokenizer.encode("<end>")[0] != tokenizer.end_id


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": "t5"}, "tokenizer.ggml.model='t5'; 'gpt2'.*Hugging Face folder"),
    ({"model": "llama"}, "lacks tokenizer.ggml.scores"),
    ({"model": "llama", "token_type": [3, 4]}, "user-defined token"),
    ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken'; known are 'gpt-2'"),
    ({"eos_token_id": None}, "lacks tokenizer.ggml.eos_token_id"),
  ],
)
def test_tokenizers_that_are_refused(changes: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    tokenizer_from_metadata(metadata(**changes), None)


def test_a_sentencepiece_vocabulary() -> None:
  """Trained with SentencePiece, whose tokens of some texts are stored beside it."""
  values = json.loads((GOLDEN.parent / "sentencepiece" / "expected.json").read_text())
  texts = values.pop("texts")
  ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
  stored = {f"tokenizer.ggml.{k}": v for k, v in (values | ids | {"model": "llama"}).items()}
  tokenizer = tokenizer_from_metadata(stored, None)
  assert (tokenizer.start_ids, tokenizer.end_id) == ((1,), 2)
  assert {text: tokenizer.encode(text) for text in texts} == texts
  for text, tokens in texts.items():
    if "▁" not in text:
      assert tokenizer.decode(tokens) == (f" {text}" if text else "")


def test_another_end_token() -> None:
  assert tokenizer_from_metadata(metadata(), "x").end_token == "x"
