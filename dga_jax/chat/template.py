"""Chat templates: the messages of a conversation as the text and tokens that a model was tuned on.

A template comes with a checkpoint: as "chat_template" of tokenizer_config.json (a string, or a list
of named ones), as chat_template.jinja or additional_chat_templates/NAME.jinja, or as
tokenizer.chat_template of a GGUF file. The conversion stores all of them in the entry "origin" of
the checkpoint's config. `sandbox.py` runs them.

    template = load_chat_template("runs/llama")
    ids = encode_chat(template, [{"role": "user", "content": "What is the capital of France?"}])

The special tokens in the encoded text are those that the template wrote. A special token that a
message spells out stays ordinary characters, so a message cannot end its own turn.
"""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from dga_jax.chat.sandbox import Sandbox, TemplateError
from dga_jax.tokenizer import encode_texts, Tokenizer

_MAX_SOURCE = 1 << 20  # Characters of a template; the largest known ones have some 30 thousand.
_DEFAULT, _TOOL_USE = "default", "tool_use"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Unicode's noncharacters, which no text contains: one breaks up the special tokens in messages,
# the other begins the special tokens in the copy of the tokenizer.
_BREAK, _NAME = "\ufdd0", "\ufdd1"


class ChatTemplate:
  """A chat template and the tokenizer of its model; compiled when it is first used.

  Args:
    source: the template, in jinja2's language.
    tokenizer: of the model.
    special_tokens: what the template calls bos_token, eos_token and so on. The end token of the
      tokenizer is the eos_token unless another is given.

  Attributes:
    source: the template.
    special_tokens: as given, with the eos_token.

  Raises:
    ValueError: the source is longer than a MiB.
  """

  def __init__(
    self, source: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str] | None = None
  ) -> None:
    if len(source) > _MAX_SOURCE:
      raise ValueError(
        f"The chat template has {len(source)} characters; at most {_MAX_SOURCE} are supported."
      )
    self.source = source
    self.special_tokens = {"eos_token": tokenizer.end_token, **(special_tokens or {})}
    self._tokenizer = tokenizer

  @functools.cached_property
  def sandbox(self) -> Sandbox:
    """The compiled template.

    Raises:
      ValueError: the source is not a template.
    """
    try:
      return Sandbox(self.source)
    except TemplateError as error:
      raise ValueError(f"The chat template is damaged. {error}") from error

  @functools.cached_property
  def encoder(self) -> "ChatEncoder":
    """Encodes what `render_marked` returns."""
    return ChatEncoder(self._tokenizer)


def load_chat_template(
  workdir: str | os.PathLike[str], step: int | None = None, *, name: str | None = None
) -> ChatTemplate:
  """The chat template of a checkpoint.

  Args:
    workdir: the folder with the checkpoint.
    step: of the checkpoint; None for the newest.
    name: of the template; None for the default one.

  Raises:
    CheckpointError: the checkpoint is missing or damaged.
    ValueError: the checkpoint has no such template.
  """
  from dga_jax.checkpoint import load_config, load_tokenizer

  origin = load_config(os.fspath(workdir), step).get("origin") or {}
  return chat_template_of(origin, load_tokenizer(os.fspath(workdir), step), name=name)


def chat_template_of(
  origin: Mapping[str, Any], tokenizer: Tokenizer, *, name: str | None = None
) -> ChatTemplate:
  """The chat template among what an import stored, see `dga_jax.conversion.origin`.

  Args:
    origin: the entry "origin" of a checkpoint's config.
    tokenizer: of the model.
    name: of the template; None for the default one.

  Raises:
    ValueError: there is no such template.
  """
  sources = template_sources(origin)
  if not sources:
    raise ValueError(
      "The checkpoint has no chat template: its model was not tuned on conversations, or was"
      " imported without its template. Give the model a plain text to continue."
    )
  chosen = _DEFAULT if name is None and _DEFAULT in sources else name
  if chosen is None and len(sources) == 1:
    (chosen,) = sources
  if chosen not in sources:
    raise ValueError(
      f"The checkpoint has no chat template {chosen or _DEFAULT!r}; it has {sorted(sources)}."
    )
  return ChatTemplate(sources[chosen], tokenizer, _special_tokens(origin))


def template_sources(origin: Mapping[str, Any]) -> dict[str, str]:
  """The chat templates by name. A template in a file of its own prevails, as in transformers."""
  stored = (origin.get("tokenizer_config") or {}).get("chat_template")
  sources: dict[str, str] = {}
  if isinstance(stored, str):
    sources[_DEFAULT] = stored
  elif isinstance(stored, list):
    for entry in stored:
      named = entry if isinstance(entry, dict) else {}
      if not (isinstance(named.get("name"), str) and isinstance(named.get("template"), str)):
        raise ValueError(
          "chat_template of tokenizer_config.json is a list with an entry that is not an object"
          " with the strings 'name' and 'template'."
        )
      sources[named["name"]] = named["template"]
  elif stored is not None:
    raise ValueError(
      f"chat_template of tokenizer_config.json is a {type(stored).__name__}; it must be a string or"
      " a list."
    )
  for path, source in (origin.get("chat_templates") or {}).items():
    file_name = path.rpartition("/")[2].removesuffix(".jinja")
    sources[file_name if "/" in path else _DEFAULT] = source
  return sources


def encode_chat(
  template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[int]:
  """The tokens of a conversation. The tokenizer adds no start tokens; the template writes them.

  Special tokens that the template wrote become those tokens. The same characters in a message or
  another variable become ordinary tokens.

  Args:
    template: of the model.
    messages: each with a "role" and "content", as far as the template knows it.
    **variables: as for `render_marked`.

  Raises:
    ValueError: the messages are not a conversation, or the template is damaged, refuses them or
      fails.
  """
  return template.encoder.encode(render_marked(template, messages, **variables))


def render_marked(
  template: ChatTemplate,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool = True,
  **variables: Any,
) -> str:
  """The text of a conversation for `ChatTemplate.encoder`, which encodes it in parts or as a whole.

  A noncharacter breaks up each special token that a message or another variable spells out.

  Args:
    template: of the model.
    messages: each with a "role" and "content", as far as the template knows it.
    add_generation_prompt: whether the text ends with the beginning of the assistant's turn.
    **variables: other variables of the template, such as tools=[...] (JSON schemas of functions) or
      enable_thinking=False.

  Raises:
    ValueError: as for `encode_chat`.
  """
  _check_messages(messages)
  mark = template.encoder.break_up
  given = {
    "tools": None,
    "documents": None,
    **{name: mark(value) for name, value in variables.items()},
    "messages": mark(list(messages)),
    "add_generation_prompt": add_generation_prompt,
  }
  try:
    return template.sandbox.render(template.special_tokens | given)
  except TemplateError as error:
    raise ValueError(f"The chat template cannot be applied. {error}") from error


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
  if not isinstance(messages, list | tuple) or not messages:
    raise ValueError(
      f"messages is {messages!r:.80}; it must be a list of at least one object with the keys"
      " 'role' and 'content'."
    )
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
      raise ValueError(
        f"messages[{i}] is {message!r:.80}; it must be an object with the string 'role', such as"
        ' {"role": "user", "content": "Hello"}.'
      )


def _special_tokens(origin: Mapping[str, Any]) -> dict[str, str]:
  found: dict[str, str] = {}
  for key in ("special_tokens_map", "tokenizer_config"):
    values = origin.get(key) or {}
    for name in _SPECIAL_TOKENS:
      value = values.get(name)
      content = value.get("content") if isinstance(value, Mapping) else value
      if isinstance(content, str):
        found[name] = content
  return found


class ChatEncoder:
  """Encodes texts in which some special tokens are meant, and others are ordinary characters.

  The special tokens of a copy of the tokenizer have names that begin with `_NAME`. So the copy
  finds the special tokens that are renamed in a text, and encodes the others as characters.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    stored = json.loads(tokenizer.to_plain_json())
    special = {token["content"] for token in stored["added_tokens"] if token["special"]}
    longest_first = sorted(filter(None, special), key=len, reverse=True)
    self._special = longest_first
    self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    self._backend = tokenizers.Tokenizer.from_str(json.dumps(_renamed(stored, special)))
    self._backend.no_padding()
    self._backend.no_truncation()

  def break_up(self, value: Any) -> Any:
    """The value, with `_BREAK` inside every special token that its texts spell.

    A special token could also be composed of a text's end and the template's next characters.
    Therefore the beginning of a special token at a text's end is broken up as well.

    Raises:
      ValueError: a text contains one of the two noncharacters.
    """
    if isinstance(value, str):
      return self._break_up(value)
    if isinstance(value, Mapping):
      return {self.break_up(key): self.break_up(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return [self.break_up(item) for item in value]
    return value

  def _break_up(self, text: str) -> str:
    for character in (_BREAK, _NAME):
      if character in text:
        raise ValueError(
          f"A message contains U+{ord(character):04X}, which Unicode reserves as a noncharacter."
        )
    broken = self._pattern.sub(lambda match: f"{match[0][0]}{_BREAK}{match[0][1:]}", text)
    longest = max(map(len, self._special), default=0)
    for size in range(min(longest - 1, len(broken)), 0, -1):
      tail = broken[-size:]
      if any(token.startswith(tail) for token in self._special):
        return f"{broken[: len(broken) - size]}{tail[0]}{_BREAK}{tail[1:]}"
    return broken

  def encode(self, text: str) -> list[int]:
    """Token ids; special tokens with `_BREAK` inside are ordinary characters.

    Raises:
      ValueError: the text has a lone surrogate, or a character that has no token.
    """
    renamed = self._pattern.sub(lambda match: _NAME + match[0], text)
    (ids,) = encode_texts(self._backend, [renamed.replace(_BREAK, "")])
    return ids


def _renamed(stored: dict[str, Any], special: set[str]) -> dict[str, Any]:
  """The JSON of a tokenizer in which `_NAME` begins every special token."""

  def new(token: str) -> str:
    return _NAME + token if token in special else token

  model = dict(stored["model"])
  vocabulary = model["vocab"]
  if isinstance(vocabulary, dict):
    model["vocab"] = {new(token): index for token, index in vocabulary.items()}
  else:  # Unigram: pairs of a token and its score.
    model["vocab"] = [[new(token), score] for token, score in vocabulary]
  if "merges" in model:
    model["merges"] = [pair for pair in model["merges"] if not _makes(pair, special)]
  if isinstance(model.get("unk_token"), str):
    model["unk_token"] = new(model["unk_token"])
  added = [
    {**token, "content": new(token["content"])} if token["special"] else token
    for token in stored["added_tokens"]
  ]
  return {**stored, "model": model, "added_tokens": added, "post_processor": None}


def _makes(merge: Any, special: set[str]) -> bool:
  """Whether a merge of BPE has a special token as a part or as its result."""
  first, second = merge.split(" ") if isinstance(merge, str) else merge
  return not special.isdisjoint((first, second, first + second))
