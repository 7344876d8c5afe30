"""The JSON files and chat templates of a Hugging Face folder, read once."""

import functools
from pathlib import Path
from typing import Any

from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.hugging_face_keys import CONFIG as CONFIG_KEYS
from dga_jax.conversion.hugging_face_keys import DTYPES, TOKEN_IDS
from dga_jax.conversion.json_files import read_json, read_text
from dga_jax.conversion.known_keys import Values

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Further chat templates, by name.
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
_MAX_TEMPLATES = 64


class FolderFiles:
  """What a folder holds beside tensors and tokenizer.json; an absent file is an empty object.

  Args:
    folder: with config.json.

  Attributes:
    folder: the folder.
    config: config.json.

  Raises:
    FileNotFoundError: there is no config.json.
    ConversionError: it is damaged.
  """

  def __init__(self, folder: Path) -> None:
    self.folder = folder
    self.config = read_json(folder / CONFIG)

  @functools.cached_property
  def generation_config(self) -> dict[str, Any]:
    """generation_config.json."""
    return self._optional(GENERATION_CONFIG)

  @functools.cached_property
  def tokenizer_config(self) -> dict[str, Any]:
    """tokenizer_config.json."""
    return self._optional(TOKENIZER_CONFIG)

  def stop_ids(self) -> list[int]:
    """Every eos_token_id of config.json, then those of generation_config.json that are new.

    Raises:
      ConversionError: one is not a token of the model.
    """
    tokens = Values(self.config, str(self.folder / CONFIG)).integer("vocab_size")
    found: dict[int, None] = {}
    for values, name in ((self.config, CONFIG), (self.generation_config, GENERATION_CONFIG)):
      checked = Values(values, str(self.folder / name))
      stored = checked["eos_token_id"]
      ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
      if not all(type(token) is int and 0 <= token < tokens for token in ids):
        raise checked.error("eos_token_id", f"a token id from 0 to {tokens - 1}, or a list of them")
      found |= dict.fromkeys(ids)
    return list(found)

  def origin(self) -> dict[str, Any]:
    """What an export writes back; see `origin.py`."""
    written_anew = CONFIG_KEYS.read | DTYPES | frozenset(TOKEN_IDS)
    kept: dict[str, Any] = {
      "config": {key: value for key, value in self.config.items() if key not in written_anew},
      "token_ids": {key: self.config[key] for key in TOKEN_IDS if key in self.config},
      "generation_config": self.generation_config,
      "tokenizer_config": self.tokenizer_config,
      "special_tokens_map": self._optional(SPECIAL_TOKENS_MAP),
      "chat_templates": self._chat_templates(),
    }
    length = Values(self.config, str(self.folder / CONFIG))
    if "max_position_embeddings" in length:
      kept["max_position_embeddings"] = length.integer("max_position_embeddings")
    return {"model_type": self.config["model_type"], **{k: v for k, v in kept.items() if v}}

  def _optional(self, name: str) -> dict[str, Any]:
    path = self.folder / name
    return read_json(path) if path.is_file() else {}

  def _chat_templates(self) -> dict[str, str]:
    """The templates that have files of their own, by the file's path in the folder."""
    paths = [self.folder / CHAT_TEMPLATE]
    folder = self.folder / CHAT_TEMPLATE_FOLDER
    if folder.is_dir():
      paths += sorted(path for path in folder.iterdir() if path.suffix == ".jinja")
    if len(paths) > _MAX_TEMPLATES:
      raise ConversionError(f"{folder} has more than {_MAX_TEMPLATES} chat templates.")
    return {
      path.relative_to(self.folder).as_posix(): read_text(path) for path in paths if path.is_file()
    }
