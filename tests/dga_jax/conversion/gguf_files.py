"""Writers of GGUF files of the golden models, and metadata of small tokenizers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from dga_jax.conversion.param_map import tensor_specs
from dga_jax.model import ModelConfig

GOLDEN = Path(__file__).parents[2] / "golden" / "hugging_face"
SENTENCEPIECE = GOLDEN.parent / "sentencepiece" / "expected.json"
ARCHITECTURES = {"llama3": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
  """Moves channels c and c + D/2 of each head to rows 2c and 2c + 1, the layout of llama.cpp."""
  D = len(weights) // heads
  rows = [h * D + c + half for h in range(heads) for c in range(D // 2) for half in (0, D // 2)]
  return weights[rows]


def stored_tensors(family: str, config: ModelConfig) -> dict[str, np.ndarray]:
  """The tensors of a golden model in float32, by GGUF name, in the layout of llama.cpp."""
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
  big_endian: bool = False,
  changes: Mapping[str, Any] | None = None,
) -> Path:
  """Writes a GGUF file. `changes` replaces metadata; the value None omits a key."""
  values: dict[str, Any] = {
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
  values |= byte_level_metadata() | dict(changes or {})
  endian = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
  writer = gguf.GGUFWriter(path, architecture, endianess=endian)
  for key, value in values.items():
    add(writer, key, value)
  for name, tensor in tensors.items():
    kind = Q8_0 if quantized(name) else F32
    writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  """Adds a metadata entry with the type that llama.cpp's converter uses for such a value."""
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, list):
    writer.add_array(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  elif value is not None:
    writer.add_uint32(key, value)


def byte_level_metadata() -> dict[str, Any]:
  """Metadata of the byte-level tokenizer of the golden models."""
  model = json.loads((GOLDEN / "smollm" / "tokenizer.json").read_text())["model"]
  values = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": sorted(model["vocab"], key=model["vocab"].get),
    "token_type": [3] * 4 + [1] * (len(model["vocab"]) - 4),
    "merges": [" ".join(merge) for merge in model["merges"]],
    "add_bos_token": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
  }
  return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def letters_metadata(**changes: Any) -> dict[str, Any]:
  """Metadata of a tokenizer of single bytes and a few merges, as GGUFFile returns it."""
  letters = pre_tokenizers.ByteLevel.alphabet()
  tokens = ["<end>", *sorted(letters), "12", "Ġx", "12x"]
  values = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": tokens,
    "token_type": np.array([3, *[1] * (len(tokens) - 1)]),
    "merges": ["1 2", "Ġ x"],
    "eos_token_id": 0,
    "bos_token_id": 0,
    "add_bos_token": False,
  }
  merged = {key: value for key, value in (values | changes).items() if value is not None}
  return {f"tokenizer.ggml.{key}": value for key, value in merged.items()}


def sentencepiece_metadata(**changes: Any) -> tuple[dict[str, Any], dict[str, list[int]]]:
  """Metadata of a tokenizer trained with SentencePiece, and the token ids of some texts."""
  values = json.loads(SENTENCEPIECE.read_text())
  texts = values.pop("texts")
  values |= {key: np.array(values[key]) for key in ("scores", "token_type")}
  values |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "model": "llama"}
  return {f"tokenizer.ggml.{k}": v for k, v in (values | changes).items()}, texts
