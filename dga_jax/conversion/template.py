"""The tokens that a tokenizer's template puts around a text, and what the files say of them."""

import dataclasses

import tokenizers
from tokenizers import processors

from dga_jax.conversion.checkpoint_reader import TokenizerChoices
from dga_jax.conversion.errors import ConversionError
from dga_jax.tokenizer import template_tokens, Tokenizer


@dataclasses.dataclass(frozen=True)
class StatedTokens:
  """What the files beside a tokenizer say of the tokens around a text; None where they are silent.

  Attributes:
    where: the file, for messages.
    bos_token: the begin token.
    add_bos_token: whether it is put before a text.
    add_eos_token: whether the end token is put behind a text.
  """

  where: str
  bos_token: str | None
  add_bos_token: bool | None
  add_eos_token: bool | None


def settle_template(
  backend: tokenizers.Tokenizer, stated: StatedTokens, choices: TokenizerChoices
) -> None:
  """Makes the template of `backend` what the files and the user say.

  transformers 4 follows add_bos_token and add_eos_token for some classes of tokenizers, and
  transformers 5 follows the template in tokenizer.json. So files that contradict each other are
  an error, which a choice of the user settles.

  Args:
    backend: the library's tokenizer; its template may change.
    stated: by the other files.
    choices: of the user.

  Raises:
    ConversionError: the files contradict each other, or the begin token is missing.
  """
  before, after = template_tokens(backend)
  if (after or stated.add_eos_token) and choices.add_eos_token is None:
    raise ConversionError(
      f"{stated.where}: the end token is put behind every text, so that a prompt has no "
      "continuation. Pass --noadd_eos_token to leave it out."
    )
  begins = bool(before) if stated.bos_token is None else stated.bos_token in before
  wants = choices.add_bos_token if choices.add_bos_token is not None else stated.add_bos_token
  if wants is None:
    wants = begins
  if wants != begins and choices.add_bos_token is None:
    does = "puts" if begins else "does not put"
    raise ConversionError(
      f"{stated.where} has add_bos_token={str(wants).lower()}, but the template of tokenizer.json "
      f"{does} a begin token before a text. Choose with --add_bos_token or --noadd_bos_token."
    )
  if wants != begins:
    before = [_begin_token(backend, stated)] if wants else []
  if wants != begins or after:
    _set_template(backend, before)


def json_with_start_tokens(tokenizer: Tokenizer) -> str:
  """tokenizer.json whose template puts `start_ids` before a text, as training and prompts do.

  The template of an imported tokenizer does so already; a tokenizer made here has none.
  """
  backend = tokenizers.Tokenizer.from_str(tokenizer.to_plain_json())
  if tokenizer.start_ids and backend.post_processor is None:
    _set_template(backend, [str(backend.id_to_token(token)) for token in tokenizer.start_ids])
  return backend.to_str()


def _begin_token(backend: tokenizers.Tokenizer, stated: StatedTokens) -> str:
  token = stated.bos_token
  if token is None or backend.token_to_id(token) is None:
    raise ConversionError(
      f"{stated.where} names no begin token of the vocabulary, which add_bos_token needs."
    )
  return token


def _set_template(backend: tokenizers.Tokenizer, before: list[str]) -> None:
  special = [(token, backend.token_to_id(token)) for token in dict.fromkeys(before)]
  backend.post_processor = processors.TemplateProcessing(
    single=[*before, "$A"], special_tokens=special
  )
