"""What an import stores beside the model, so that an export gives it back.

A checkpoint's config has the entry "origin", a JSON object. All of its keys are optional:

  model_type               the family of the weights
  max_position_embeddings  the trained context length in tokens
  config                   keys of config.json that ModelConfig does not determine
  token_ids                bos_token_id, eos_token_id (an id or a list) and pad_token_id
  generation_config        generation_config.json
  tokenizer_config         tokenizer_config.json, chat templates included
  special_tokens_map       special_tokens_map.json
  chat_templates           chat templates that have files of their own, by the file's path
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from dga_jax.conversion.hugging_face_config import values_from_config
from dga_jax.conversion.hugging_face_files import (
  CHAT_TEMPLATE,
  CHAT_TEMPLATE_FOLDER,
  CONFIG,
  GENERATION_CONFIG,
  SPECIAL_TOKENS_MAP,
  TOKENIZER_CONFIG,
)
from dga_jax.model import ModelConfig
from dga_jax.tokenizer import Tokenizer

_EOS = "eos_token_id"


def json_files(
  config: ModelConfig, origin: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, dict[str, Any]]:
  """The JSON files of a Hugging Face folder by name, tokenizer.json and the index apart.

  Args:
    config: of the decoder.
    origin: the entry of the checkpoint's config.
    tokenizer: its end token and stop ids prevail over those of `origin`.

  Raises:
    ValueError: no family of transformers has the decoder's features.
  """
  token_ids, generation = _token_ids(origin, tokenizer)
  files = {
    CONFIG: origin.get("config", {}) | values_from_config(config, origin) | token_ids,
    GENERATION_CONFIG: generation,
    TOKENIZER_CONFIG: _tokenizer_config(origin, tokenizer),
    SPECIAL_TOKENS_MAP: origin.get("special_tokens_map", {}),
  }
  if files[SPECIAL_TOKENS_MAP]:
    files[SPECIAL_TOKENS_MAP] = _with_end_token(files[SPECIAL_TOKENS_MAP], tokenizer)
  return {name: values for name, values in files.items() if values}


def chat_templates(origin: Mapping[str, Any]) -> dict[str, str]:
  """The chat templates that have files of their own, by the file's path in the folder.

  Raises:
    ValueError: a path is not one of a chat template.
  """
  templates: dict[str, str] = origin.get("chat_templates", {})
  for name in templates:
    path = PurePosixPath(name)
    in_folder = len(path.parts) == 2 and path.parts[0] == CHAT_TEMPLATE_FOLDER
    if name != CHAT_TEMPLATE and not (in_folder and path.suffix == ".jinja"):
      raise ValueError(
        f"The checkpoint names the chat template {name!r}; it must be {CHAT_TEMPLATE} or "
        f"{CHAT_TEMPLATE_FOLDER}/NAME.jinja."
      )
  return templates


def _token_ids(
  origin: Mapping[str, Any], tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The token ids of config.json, and generation_config.json."""
  token_ids: dict[str, Any] = dict(origin.get("token_ids", {}))
  generation: dict[str, Any] = dict(origin.get("generation_config", {}))
  if "bos_token_id" not in token_ids and tokenizer.start_ids:
    token_ids["bos_token_id"] = tokenizer.start_ids[0]
  stored = {*_listed(token_ids.get(_EOS)), *_listed(generation.get(_EOS))}
  if not stored >= set(tokenizer.stop_ids):
    ids = list(tokenizer.stop_ids)
    token_ids[_EOS] = ids if len(ids) > 1 else ids[0]
    if _EOS in generation:
      generation[_EOS] = token_ids[_EOS]
  return token_ids, generation


def _tokenizer_config(origin: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
  stored: dict[str, Any] = dict(origin.get("tokenizer_config", {}))
  if "tokenizer_class" not in stored:  # Not from a Hugging Face folder.
    plain: dict[str, Any] = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
    }
    if "max_position_embeddings" in origin:
      plain["model_max_length"] = origin["max_position_embeddings"]
    stored = plain | stored
  # The template in tokenizer.json decides; an import has made sure of it.
  if "add_bos_token" in stored:
    stored["add_bos_token"] = bool(tokenizer.start_ids)
  if "add_eos_token" in stored:
    stored["add_eos_token"] = False
  return _with_end_token(stored, tokenizer)


def _with_end_token(values: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
  stored = values.get("eos_token")
  content = stored.get("content") if isinstance(stored, Mapping) else stored
  same = content == tokenizer.end_token
  return dict(values) if same else {**values, "eos_token": tokenizer.end_token}


def _listed(ids: Any) -> list[int]:
  return ids if isinstance(ids, list) else [] if ids is None else [ids]
