"""The tokenizer of a Hugging Face folder: tokenizer.json, and what the files beside it change."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dga_jax.conversion.checkpoint_reader import TokenizerChoices
from dga_jax.conversion.errors import conversion_errors, ConversionError, shown
from dga_jax.conversion.hugging_face_files import FolderFiles
from dga_jax.conversion.json_files import MAX_TOKENIZER_BYTES, parse_json, read_text
from dga_jax.conversion.known_keys import Values
from dga_jax.conversion.template import settle_template, StatedTokens
from dga_jax.tokenizer import FILE_NAME, Tokenizer


def read_tokenizer(files: FolderFiles, choices: TokenizerChoices) -> Tokenizer:
  """The tokenizer of a folder.

  Its end token is, in this order, that of `choices`, of tokenizer_config.json and of config.json.
  Every eos_token_id of config.json and generation_config.json is a stop id.

  Raises:
    FileNotFoundError: there is no tokenizer.json.
    ConversionError: a file is damaged, files contradict each other, or no file names an end token.
  """
  path = files.folder / FILE_NAME
  if not path.is_file():
    raise FileNotFoundError(
      f"There is no {path}. transformers writes one: "
      f"AutoTokenizer.from_pretrained({str(files.folder)!r}).save_pretrained(...)"
    )
  text = read_text(path, MAX_TOKENIZER_BYTES)
  stored = parse_json(text, path)
  _check_model(stored, path)
  config_path = files.folder / "tokenizer_config.json"
  config = Values(files.tokenizer_config, str(config_path))
  _check_prefix_space(stored, config)
  stop_ids = files.stop_ids()
  with conversion_errors(f"{path} is damaged"):
    backend = tokenizers.Tokenizer.from_str(text)
  with conversion_errors(path):
    _check_added_tokens(backend, stored.get("added_tokens") or (), config)
    stated = StatedTokens(
      where=str(config_path if files.tokenizer_config else path),
      bos_token=special_token(config, "bos_token"),
      add_bos_token=_flag(config, "add_bos_token"),
      add_eos_token=_flag(config, "add_eos_token"),
    )
    settle_template(backend, stated, choices)
    end_token = choices.end_token or special_token(config, "eos_token")
    if end_token is None:
      end_token = _token_of(backend, stop_ids, files)
    return Tokenizer.imported(backend, end_token, stop_ids=stop_ids)


def special_token(config: Values, key: str) -> str | None:
  """A token of tokenizer_config.json, which is a string or an object with the string inside."""
  value = config[key]
  if isinstance(value, Mapping):
    value = value.get("content")
  if value is not None and not isinstance(value, str):
    raise config.error(key, "a string, or an object with a string 'content'")
  return value


def _flag(config: Values, key: str) -> bool | None:
  return config.boolean(key) if key in config else None


def _token_of(backend: tokenizers.Tokenizer, stop_ids: list[int], files: FolderFiles) -> str:
  tokens = [backend.id_to_token(token_id) for token_id in stop_ids]
  named = [token for token in tokens if token is not None]
  if not named:
    raise ConversionError(
      f"Neither tokenizer_config.json nor config.json in {files.folder} names a token that ends a "
      "text; give one with --end_token."
    )
  return named[0]


def _check_model(stored: Mapping[str, Any], path: Path) -> None:
  """Refuses a model that encodes at random."""
  model = stored.get("model")
  if not isinstance(model, dict):
    raise ConversionError(f"{path} is damaged: it has no model.")
  values = Values(model, str(path), "model.")
  if values.number("dropout", 0.0) != 0:
    raise values.error("dropout", "null or 0, since dropout gives a text other tokens every time")


def _check_prefix_space(stored: Mapping[str, Any], config: Values) -> None:
  """Compares add_prefix_space with what the steps of tokenizer.json put before a text."""
  if "add_prefix_space" not in config:
    return
  stated = config.boolean("add_prefix_space")
  steps = [*_steps(stored.get("normalizer")), *_steps(stored.get("pre_tokenizer"))]
  if any(map(_prepends, steps)) != stated:
    raise config.error("add_prefix_space", f"{str(not stated).lower()}, as in {FILE_NAME}")


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
  """The normalizers or pre-tokenizers in a sequence of them, one level deep."""
  if not isinstance(step, dict):
    return
  yield step
  for name in ("normalizers", "pretokenizers"):
    inner = step.get(name)
    if isinstance(inner, list):
      yield from (one for one in inner if isinstance(one, dict))


def _prepends(step: Mapping[str, Any]) -> bool:
  kind = step.get("type")
  if kind == "Metaspace":
    old_default = "always" if step.get("add_prefix_space", True) else "never"
    return bool(step.get("prepend_scheme", old_default) != "never")
  return kind == "Prepend" or (kind == "ByteLevel" and step.get("add_prefix_space") is True)


def _check_added_tokens(
  backend: tokenizers.Tokenizer, tokens: Sequence[Mapping[str, Any]], config: Values
) -> None:
  """Refuses an added token that the library gives another id than the files.

  The library counts on from the model's vocabulary, and says nothing if an id in tokenizer.json
  differs. It does not read added_tokens_decoder of tokenizer_config.json.
  """
  for token in tokens:
    if (given := backend.token_to_id(token["content"])) != token["id"]:
      raise ValueError(
        f"The added token {shown(token['content'])} has the id {token['id']}, but the vocabulary "
        f"gives it {given}."
      )
  added = config.mapping("added_tokens_decoder")
  for token_id in added or ():
    assert added is not None
    token = added[token_id]
    content = token.get("content") if isinstance(token, dict) else token
    number = int(token_id) if token_id.isdecimal() and len(token_id) < 10 else -1
    if not isinstance(content, str) or backend.token_to_id(content) != number:
      raise ConversionError(
        f"{added.where} has the token {shown(content)} with id {shown(token_id)}; {FILE_NAME} has "
        "no such token at that id."
      )
