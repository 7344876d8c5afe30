"""The tokenizer that a GGUF file's metadata describes, as one of the `tokenizers` library."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, Regex

from dga_jax.tokenizer import Tokenizer

# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4

# How a text falls into words before the merges, by tokenizer.ggml.pre. {} stands for the digits
# that stay together. Contractions, then words with the character before them, digits,
# punctuation, line ends and spaces are apart.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}|"
  r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _SPLIT.format(r"\p{N}{1,3}")
_QWEN2 = _SPLIT.format(r"\p{N}")


def tokenizer_from_metadata(metadata: Mapping[str, Any], end_token: str | None) -> Tokenizer:
  """Byte-level BPE from tokenizer.ggml.*.

  Args:
    metadata: of the GGUF file, by its keys.
    end_token: the token that ends a text, in place of the file's.

  Raises:
    ValueError: another kind of tokenizer, an unknown rule for words, or missing keys.
  """
  kind = _get(metadata, "model")
  if kind != "gpt2":
    raise ValueError(
      f"The GGUF file has tokenizer.ggml.model={kind!r}; only 'gpt2', byte-level BPE, can be "
      "rebuilt. Convert the model's Hugging Face folder, which has a tokenizer.json."
    )
  tokens = _get(metadata, "tokens")
  pre = metadata.get("tokenizer.ggml.pre", "default")
  merges = [tuple(merge.split(" ", 1)) for merge in _get(metadata, "merges")]
  vocabulary = {token: index for index, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
  backend.pre_tokenizer = _pre_tokenizer(pre)
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  _add_special_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type", []))
  if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
    start = tokens[_get(metadata, "bos_token_id")]
    backend.post_processor = processors.TemplateProcessing(
      single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
    )
  return Tokenizer.imported(backend, end_token or tokens[_get(metadata, "eos_token_id")])


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
  if pre in ("gpt-2", "default"):
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if pre == "smollm":
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
  patterns = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
  if pre not in patterns:
    raise ValueError(
      f"The GGUF file has tokenizer.ggml.pre={pre!r}; known are 'gpt-2', 'default', 'smollm', "
      f"{', '.join(map(repr, patterns))}. Convert the model's Hugging Face folder instead."
    )
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(patterns[pre]), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
  kinds = list(zip(tokens, types, strict=False))
  control = [AddedToken(t, special=True, normalized=False) for t, k in kinds if k == _CONTROL]
  defined = [AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED]
  backend.add_special_tokens(control)
  backend.add_tokens(defined)


def _get(metadata: Mapping[str, Any], key: str) -> Any:
  value = metadata.get(f"tokenizer.ggml.{key}")
  if value is None:
    raise ValueError(f"The GGUF file lacks tokenizer.ggml.{key}.")
  return value
