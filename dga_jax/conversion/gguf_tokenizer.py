"""The tokenizer in a GGUF file's metadata, as one of the `tokenizers` library."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, Regex

from dga_jax.conversion.checkpoint_reader import TokenizerChoices
from dga_jax.conversion.errors import conversion_errors, ConversionError, shown
from dga_jax.conversion.known_keys import Values
from dga_jax.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
# Characters of a SentencePiece token: its trainer makes 16 by default. A longer token would make
# the search for merges, which is quadratic in the length, slow.
_MAX_PIECE = 256

# {} is how many digits stay together. Contractions, words with the character before them, digits,
# punctuation, line ends and spaces are apart.
_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}|"
  r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (_SPLIT.format(r"\p{N}{1,3}"),)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# The rules that split a text into words before the merges, by tokenizer.ggml.pre: expressions, each
# of which splits the pieces that the ones before it leave.
_RULES: dict[str, tuple[str, ...]] = {
  "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
  "gpt-2": (_GPT2,),
  "smollm": (r"\p{N}", _GPT2),
  "qwen2": (_SPLIT.format(r"\p{N}"),),
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
}


def tokenizer_from_metadata(
  metadata: Mapping[str, Any], choices: TokenizerChoices, where: str
) -> Tokenizer:
  """The tokenizer of tokenizer.ggml.*: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

  The ids of the end of a text, of a turn and of a message (eos, eot, eom) are its stop ids.

  Args:
    metadata: of the GGUF file, by its keys.
    choices: of the user.
    where: names the file in messages.

  Raises:
    ConversionError: another kind of tokenizer, an unknown or missing rule for words, missing or
      damaged entries.
  """
  values = _ggml(metadata, where)
  kind = values.string("model")
  if kind not in ("gpt2", "llama"):
    raise ConversionError(
      f"{where} has tokenizer.ggml.model={shown(kind)}; 'gpt2', byte-level BPE, and 'llama', "
      "SentencePiece's, are supported. Convert the model's Hugging Face folder, which has a "
      "tokenizer.json."
    )
  tokens = _tokens(values)
  rule = _rule(values, choices) if kind == "gpt2" else None
  with conversion_errors(where):
    backend = _sentencepiece(values, tokens) if rule is None else _byte_level(values, tokens, rule)
    if _adds_bos(values, choices, starts=rule is None or _RULES[rule] is _LLAMA3):
      index = values.integer("bos_token_id", least=0, most=len(tokens) - 1)
      backend.post_processor = processors.TemplateProcessing(
        single=[tokens[index], "$A"], special_tokens=[(tokens[index], index)]
      )
    stop_ids = _stop_ids(values, len(tokens))
    if choices.end_token is None and not stop_ids:
      raise ConversionError(f"{where} lacks tokenizer.ggml.eos_token_id; give --end_token.")
    return Tokenizer.imported(backend, choices.end_token or tokens[stop_ids[0]], stop_ids=stop_ids)


def origin_from_metadata(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
  """What an export writes back of the tokenizer: special tokens and chat templates.

  Raises:
    ConversionError: an id that is no token, or a template that is no string.
  """
  values = _ggml(metadata, where)
  tokens = _tokens(values)
  last = len(tokens) - 1
  roles = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
  ids = {
    role: values.integer(key, least=0, most=last) for role, key in roles.items() if key in values
  }
  config: dict[str, Any] = {f"{role}_token": tokens[index] for role, index in ids.items()}
  if template := _chat_template(Values(metadata, where)):
    config["chat_template"] = template
  stored: dict[str, Any] = {f"{role}_token_id": index for role, index in ids.items()}
  if len(stop_ids := _stop_ids(values, len(tokens))) > 1:
    stored["eos_token_id"] = stop_ids
  return {"token_ids": stored, "tokenizer_config": config}


def _chat_template(metadata: Values) -> str | list[dict[str, str]] | None:
  """The chat template, or a list of them with names, in the form of tokenizer_config.json."""
  key = "tokenizer.chat_template"
  prefix = f"{key}."
  named = {name: metadata.string(name) for name in metadata if name.startswith(prefix)}
  if not named:
    return metadata.string(key) if key in metadata else None
  templates = {"default": metadata.string(key)} if key in metadata else {}
  templates |= {name.removeprefix(prefix): template for name, template in named.items()}
  return [{"name": name, "template": template} for name, template in templates.items()]


def _stop_ids(values: Values, count: int) -> list[int]:
  keys = [key for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in values]
  ids = [values.integer(key, least=0, most=count - 1) for key in keys]
  return list(dict.fromkeys(ids))


def _adds_bos(values: Values, choices: TokenizerChoices, *, starts: bool) -> bool:
  """Whether the begin token is put before a text; `starts` is the tokenizer's default."""
  if values.boolean("add_eos_token", False) and choices.add_eos_token is None:
    raise ConversionError(
      f"{values.where} has tokenizer.ggml.add_eos_token=True: a prompt with an end token behind it "
      "has no continuation. Pass --noadd_eos_token to leave it out."
    )
  if choices.add_bos_token is not None:
    return choices.add_bos_token
  return values.boolean("add_bos_token", starts)


def _rule(values: Values, choices: TokenizerChoices) -> str:
  """The name of the rule that splits a text into words."""
  if choices.pre is None and "pre" not in values:
    raise ConversionError(
      f"{values.where} lacks tokenizer.ggml.pre, the rule that splits a text into words: files of "
      "before May 2024 have none, and a wrong rule gives other tokens. Choose it with "
      f"--tokenizer_pre, one of {', '.join(_RULES)}; LLaMA 3 has llama-bpe."
    )
  rule = choices.pre or values.string("pre")
  if rule not in _RULES:
    raise ConversionError(
      f"{values.where} has tokenizer.ggml.pre={shown(rule)}; supported are {', '.join(_RULES)}. "
      "Convert the model's Hugging Face folder instead."
    )
  return rule


def _byte_level(values: Values, tokens: list[str], rule: str) -> tokenizers.Tokenizer:
  if values.boolean("add_space_prefix", False):
    raise values.error("add_space_prefix", "false for byte-level BPE")
  merges = []
  for merge in _texts(values, "merges"):
    first, space, second = merge.partition(" ")
    if not space:
      raise ConversionError(f"{values.where} has the merge {shown(merge)}, which lacks a space.")
    merges.append((first, second))
  vocabulary = {token: index for index, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, ignore_merges=_RULES[rule] is _LLAMA3)
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _RULES[rule]),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  if rule == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  _add_special_tokens(backend, values, tokens)
  return backend


def _sentencepiece(values: Values, tokens: list[str]) -> tokenizers.Tokenizer:
  """SentencePiece keeps no merges: any two neighbours whose union is a piece may merge.

  The piece with the highest score is made first.
  """
  kinds, scores = _numbers(values, "token_type", tokens), _numbers(values, "scores", tokens)
  if (kinds == _USER_DEFINED).any():
    defined = tokens[int((kinds == _USER_DEFINED).argmax())]
    raise ConversionError(
      f"{values.where}: its SentencePiece vocabulary has the user-defined token {shown(defined)}, "
      "which cannot be rebuilt. Convert the model's Hugging Face folder instead."
    )
  if long := [token for token in tokens if len(token) > _MAX_PIECE]:
    raise values.error("tokens", f"of at most {_MAX_PIECE} characters, unlike {shown(long[0])}")
  vocabulary = {token: index for index, token in enumerate(tokens)}
  pieces = {tokens[i]: float(scores[i]) for i in np.flatnonzero(kinds == _NORMAL).tolist()}
  merges = [
    (piece[:cut], piece[cut:])
    for piece in sorted(pieces, key=lambda piece: -pieces[piece])
    for cut in range(1, len(piece))
    if piece[:cut] in pieces and piece[cut:] in pieces
  ]
  unknown = tokens[values.integer("unknown_token_id", 0, least=0, most=len(tokens) - 1)]
  falls_back = bool((kinds == _BYTE).any())
  backend = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=falls_back)
  )
  steps: list[Any] = [normalizers.Replace(" ", "▁")]
  if values.boolean("add_space_prefix", True):
    steps.insert(0, normalizers.Prepend("▁"))
  backend.normalizer = normalizers.Sequence(steps)
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
  )
  _add_special_tokens(backend, values, tokens)
  return backend


def _add_special_tokens(backend: tokenizers.Tokenizer, values: Values, tokens: list[str]) -> None:
  if values["token_type"] is None:
    return
  kinds = _numbers(values, "token_type", tokens).tolist()
  typed = list(zip(tokens, kinds, strict=True))
  control = [AddedToken(t, special=True, normalized=False) for t, k in typed if k == _CONTROL]
  defined = [AddedToken(t, normalized=False) for t, k in typed if k == _USER_DEFINED]
  backend.add_special_tokens(control)
  backend.add_tokens(defined)


def _ggml(metadata: Mapping[str, Any], where: str) -> Values:
  inside = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
  return Values(inside, where, _PREFIX)


def _tokens(values: Values) -> list[str]:
  tokens = _texts(values, "tokens")
  if not tokens:
    raise values.error("tokens", "a list with a token")
  if len(set(tokens)) < len(tokens):
    seen: set[str] = set()
    twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
    raise ConversionError(f"{values.where} has the token {shown(twice)} twice.")
  return tokens


def _texts(values: Values, key: str) -> list[str]:
  texts = values[key]
  if texts is None:
    raise ConversionError(f"{values.where} lacks {_PREFIX}{key}.")
  if not isinstance(texts, list):
    raise values.error(key, "an array of strings")
  return texts


def _numbers(values: Values, key: str, tokens: list[str]) -> np.ndarray:
  """An array with a finite number for each token."""
  numbers = values[key]
  if numbers is None:
    raise ConversionError(f"{values.where} lacks {_PREFIX}{key}.")
  if not isinstance(numbers, np.ndarray) or len(numbers) != len(tokens):
    raise values.error(key, f"an array of {len(tokens)} numbers, one for each token")
  if not np.isfinite(numbers).all():
    raise values.error(key, "finite numbers")
  return numbers
