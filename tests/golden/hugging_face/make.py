"""Creates the fixtures of this folder: tiny random models and their logits in transformers.

  python -m venv made && made/bin/pip install "torch==2.13.0" "transformers==5.23.0"
  made/bin/python tests/golden/hugging_face/make.py

Weights are stored in bfloat16. Logits are computed from these weights in float32. Weights are
large, and scales and biases are random, so that an error in any parameter changes the logits.
"""

import json
import pathlib
import shutil

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

FOLDER = pathlib.Path(__file__).parent
VOCABULARY = 64
TOKENS = 48
SIZES = {
  "vocab_size": VOCABULARY,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def rope(theta: float) -> dict:
  return {"rope_type": "default", "rope_theta": theta}


CONFIGS = {
  "llama2": transformers.LlamaConfig(
    **SIZES | {"num_key_value_heads": 4}, rms_norm_eps=1e-5, rope_parameters=rope(10000.0)
  ),
  "llama3": transformers.LlamaConfig(
    **SIZES, rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE, eos_token_id=[2, 3]
  ),
  "mistral": transformers.MistralConfig(
    **SIZES, sliding_window=8, rms_norm_eps=1e-5, rope_parameters=rope(10000.0)
  ),
  "qwen2": transformers.Qwen2Config(
    **SIZES, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_parameters=rope(1e6)
  ),
  "qwen3": transformers.Qwen3Config(
    **SIZES, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_parameters=rope(1e6)
  ),
  "smollm": transformers.LlamaConfig(
    **SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope(1e5)
  ),
}


def byte_level_tokenizer() -> tokenizers.Tokenizer:
  words = ["<begin>", "<other>", "<end>", "<turn>", "Ġ", *LETTERS, "th", "the", "Ġa"]
  merges = [("t", "h"), ("th", "e"), ("Ġ", "a")]
  backend = tokenizers.Tokenizer(models.BPE(dict(zip(words, range(64), strict=False)), merges))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.post_processor = processors.TemplateProcessing(
    single="<begin> $A", special_tokens=[("<begin>", 0)]
  )
  backend.add_special_tokens(words[:4])
  return backend


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
  words = ["<begin>", "<other>", "<end>", "<turn>", "▁", *LETTERS, "th", "the", "▁a"]
  merges = [("t", "h"), ("th", "e"), ("▁", "a")]
  vocabulary = dict(zip(words, range(64), strict=False))
  backend = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, unk_token="<other>", fuse_unk=True, byte_fallback=True)
  )
  steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  backend.normalizer = normalizers.Sequence(steps)
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
  )
  backend.post_processor = processors.TemplateProcessing(
    single="<begin> $A", special_tokens=[("<begin>", 0)]
  )
  backend.add_special_tokens(words[:4])
  return backend


def make(name: str, config: transformers.PretrainedConfig, seed: int) -> None:
  folder = FOLDER / name
  shutil.rmtree(folder, ignore_errors=True)
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  with torch.no_grad():
    for path, weight in model.named_parameters():
      scale = path.endswith("norm.weight")
      weight.copy_(torch.randn(weight.shape) * (0.2 if scale else 0.3) + scale)
  model.to(torch.bfloat16)
  # A shard size of 20 KB gives several files and an index.
  model.save_pretrained(folder, max_shard_size="20KB" if name == "llama3" else "1GB")
  make_tokenizer = (
    sentencepiece_tokenizer if name in ("llama2", "mistral") else byte_level_tokenizer
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=make_tokenizer(), bos_token="<begin>", eos_token="<end>"
  )
  tokenizer.save_pretrained(folder)
  (folder / "generation_config.json").unlink()

  # Reload the model, because the conversion to bfloat16 also rounded its RoPE frequencies.
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (1, TOKENS))
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens)).logits.numpy()
  text = "the cat and the axe"
  np.savez_compressed(
    folder / "expected.npz",
    tokens=tokens.astype(np.int32),
    logits=logits.astype(np.float32),
    text=text,
    text_ids=np.array(tokenizer(text).input_ids, np.int32),
  )
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(f"{name}: {size // 1000} kB", json.dumps({"largest logit": float(np.abs(logits).max())}))


if __name__ == "__main__":
  for number, (family, family_config) in enumerate(CONFIGS.items()):
    make(family, family_config, number)
