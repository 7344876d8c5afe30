"""The tokenizer that a GGUF file's metadata describes, as one of the `tokenizers` library."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, Regex

from dga_jax.tokenizer import Tokenizer

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

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
  """The tokenizer of tokenizer.ggml.*: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

  Args:
    metadata: of the GGUF file, by its keys.
    end_token: the token that ends a text, in place of the file's.

  Raises:
    ValueError: another kind of tokenizer, an unknown rule for words, or missing keys.
  """
  kind = _get(metadata, "model")
  if kind not in ("gpt2", "llama"):
    raise ValueError(
      f"The GGUF file has tokenizer.ggml.model={kind!r}; 'gpt2', byte-level BPE, and 'llama', "
      "SentencePiece's, can be rebuilt. Convert the model's Hugging Face folder, which has a "
      "tokenizer.json."
    )
  backend = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
  tokens = _get(metadata, "tokens")
  starts = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
  if metadata.get("tokenizer.ggml.add_bos_token", starts):
    index = _get(metadata, "bos_token_id")
    backend.post_processor = processors.TemplateProcessing(
      single=f"{tokens[index]} $A", special_tokens=[(tokens[index], index)]
    )
  return Tokenizer.imported(backend, end_token or tokens[_get(metadata, "eos_token_id")])


def _byte_level(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  pre = metadata.get("tokenizer.ggml.pre", "default")
  merges = [tuple(merge.split(" ", 1)) for merge in _get(metadata, "merges")]
  backend = tokenizers.Tokenizer(
    models.BPE(_vocabulary(metadata), merges, ignore_merges=pre == "llama-bpe")
  )
  backend.pre_tokenizer = _pre_tokenizer(pre)
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  _add_special_tokens(backend, metadata)
  return backend


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """SentencePiece keeps no merges: any two neighbours whose union is a piece may merge.

  The piece with the highest score is made first.
  """
  kinds = _get(metadata, "token_type")
  if _USER_DEFINED in kinds:
    defined = _get(metadata, "tokens")[kinds.index(_USER_DEFINED)]
    raise ValueError(
      f"The GGUF file's SentencePiece vocabulary has the user-defined token {defined!r}, which "
      "cannot be rebuilt. Convert the model's Hugging Face folder instead."
    )
  vocabulary = _vocabulary(metadata)
  pieces = {
    token: score
    for token, score, kind in zip(vocabulary, _get(metadata, "scores"), kinds, strict=True)
    if kind == _NORMAL
  }
  merges = [
    (piece[:cut], piece[cut:])
    for piece in sorted(pieces, key=lambda piece: -pieces[piece])
    for cut in range(1, len(piece))
    if piece[:cut] in pieces and piece[cut:] in pieces
  ]
  unknown = _get(metadata, "tokens")[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
  backend = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds)
  )
  steps: list[Any] = [normalizers.Replace(" ", "▁")]
  if metadata.get("tokenizer.ggml.add_space_prefix", True):
    steps.insert(0, normalizers.Prepend("▁"))
  backend.normalizer = normalizers.Sequence(steps)
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
  )
  _add_special_tokens(backend, metadata)
  return backend


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


def _add_special_tokens(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
  types = metadata.get("tokenizer.ggml.token_type", [])
  kinds = list(zip(_get(metadata, "tokens"), types, strict=False))
  control = [AddedToken(t, special=True, normalized=False) for t, k in kinds if k == _CONTROL]
  defined = [AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED]
  backend.add_special_tokens(control)
  backend.add_tokens(defined)


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
  return {token: index for index, token in enumerate(_get(metadata, "tokens"))}


def _get(metadata: Mapping[str, Any], key: str) -> Any:
  value = metadata.get(f"tokenizer.ggml.{key}")
  if value is None:
    raise ValueError(f"The GGUF file lacks tokenizer.ggml.{key}.")
  return value
