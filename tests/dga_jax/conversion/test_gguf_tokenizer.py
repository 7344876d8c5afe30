"""Tokenizers in GGUF metadata: pre-tokenizers, begin and stop tokens, SentencePiece, errors."""

from typing import Any

import numpy as np
import pytest

from dga_jax.conversion.checkpoint_reader import NO_CHOICES, TokenizerChoices
from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.gguf_tokenizer import origin_from_metadata, tokenizer_from_metadata
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.conversion.gguf_files import letters_metadata, sentencepiece_metadata


def rebuild(metadata: dict[str, Any], choices: TokenizerChoices = NO_CHOICES) -> Tokenizer:
  return tokenizer_from_metadata(metadata, choices, "model.gguf")


@pytest.mark.parametrize(
  ("pre", "text", "words"),
  [
    ("gpt-2", "12 x", ["12", "Ġx"]),
    ("smollm", "12 x", ["1", "2", "Ġx"]),
    ("qwen2", "12 x", ["1", "2", "Ġx"]),
    ("qwen2", "e\u0301", ["Ã", "©"]),
    ("llama-bpe", "12 x", ["12", "Ġx"]),
    ("llama3", "12 x", ["12", "Ġx"]),
    ("llama-bpe", "0012", ["0", "0", "1", "2"]),
    ("llama-bpe", "12x", ["12", "x"]),
    ("default", "0012 x", ["0", "0", "1", "2", "Ġx"]),  # 001 and 2
    ("gpt-2", "0012", ["0", "0", "12"]),
  ],
)
def test_pre_tokenizers_split_words(pre: str, text: str, words: list[str]) -> None:
  metadata = letters_metadata(pre=pre)
  tokenizer = rebuild(metadata)
  tokens = metadata["tokenizer.ggml.tokens"]
  assert [tokens[index] for index in tokenizer.encode(text)] == words
  assert tokenizer.encode("<end>")[0] != tokenizer.end_id


def test_a_missing_pre_tokenizer_needs_a_choice() -> None:
  metadata = letters_metadata(pre=None, add_bos_token=None)
  with pytest.raises(ConversionError, match=r"model\.gguf lacks tokenizer\.ggml\.pre.*llama-bpe"):
    rebuild(metadata)
  chosen = rebuild(metadata, TokenizerChoices(pre="llama-bpe"))
  stated = rebuild(letters_metadata(pre="llama-bpe", add_bos_token=None))
  assert chosen.to_json() == stated.to_json()
  # Without add_bos_token, LLaMA 3 adds its begin token and GPT-2 does not.
  assert chosen.start_ids == (0,)
  assert rebuild(metadata, TokenizerChoices(pre="gpt-2")).start_ids == ()


@pytest.mark.parametrize(
  ("stated", "choice", "start_ids"),
  [
    (True, None, (0,)),
    (False, None, ()),
    (None, None, ()),
    (True, False, ()),
    (False, True, (0,)),
  ],
)
def test_the_begin_token(
  stated: bool | None, choice: bool | None, start_ids: tuple[int, ...]
) -> None:
  tokenizer = rebuild(
    letters_metadata(add_bos_token=stated), TokenizerChoices(add_bos_token=choice)
  )
  assert tokenizer.start_ids == start_ids


def test_an_end_token_after_every_text_is_refused() -> None:
  metadata = letters_metadata(add_eos_token=True)
  with pytest.raises(ConversionError, match=r"add_eos_token=True.*--noadd_eos_token"):
    rebuild(metadata)
  assert rebuild(metadata, TokenizerChoices(add_eos_token=False)).encode("x") == [
    metadata["tokenizer.ggml.tokens"].index("x")
  ]
  with pytest.raises(ValueError, match="add_eos_token is True"):
    TokenizerChoices(add_eos_token=True)


def test_end_of_text_turn_and_message_tokens_stop_a_generation() -> None:
  tokenizer = rebuild(letters_metadata(eot_token_id=5, eom_token_id=7))
  assert (tokenizer.end_id, tokenizer.stop_ids) == (0, (0, 5, 7))
  assert Tokenizer.from_json(tokenizer.to_json()).stop_ids == (0, 5, 7)
  other = rebuild(letters_metadata(eot_token_id=5), TokenizerChoices(end_token="12x"))
  assert (other.end_token, other.stop_ids) == ("12x", (other.end_id, 0, 5))
  with pytest.raises(ConversionError, match="encodes the text 'x' to its end token"):
    rebuild(letters_metadata(), TokenizerChoices(end_token="x"))


def test_a_user_defined_end_token_is_special() -> None:
  tokenizer = rebuild(letters_metadata(token_type=np.array([4, *[1] * 259])))
  assert tokenizer.end_token == "<end>"
  assert tokenizer.end_id not in tokenizer.encode("1<end>2")


def test_metadata_for_an_export_is_stored() -> None:
  metadata = letters_metadata(eot_token_id=5, padding_token_id=3) | {
    "tokenizer.chat_template": "A",
    "tokenizer.chat_template.tool": "B",
  }
  tokens = metadata["tokenizer.ggml.tokens"]
  assert origin_from_metadata(metadata, "") == {
    "token_ids": {"bos_token_id": 0, "eos_token_id": [0, 5], "pad_token_id": 3},
    "tokenizer_config": {
      "bos_token": "<end>",
      "eos_token": "<end>",
      "pad_token": tokens[3],
      "chat_template": [
        {"name": "default", "template": "A"},
        {"name": "tool", "template": "B"},
      ],
    },
  }


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": "t5"}, "tokenizer.ggml.model='t5'; 'gpt2'.*Hugging Face folder"),
    ({"model": "llama"}, "lacks tokenizer.ggml.scores"),
    ({"model": 3}, "tokenizer.ggml.model=3; it must be a string"),
    ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken'; supported are default"),
    ({"eos_token_id": None}, "lacks tokenizer.ggml.eos_token_id; give --end_token"),
    ({"eos_token_id": 2**31}, "eos_token_id=2147483648; it must be an integer from 0 to"),
    ({"eos_token_id": -1}, "eos_token_id=-1; it must be an integer of at least 0"),
    ({"bos_token_id": 9999, "add_bos_token": True}, "bos_token_id=9999; it must be an integer"),
    ({"add_bos_token": 1}, "add_bos_token=1; it must be true or false"),
    ({"add_space_prefix": True}, "add_space_prefix=True; it must be false"),
    ({"tokens": None}, "lacks tokenizer.ggml.tokens"),
    ({"tokens": []}, "tokens=.*; it must be a list with a token"),
    ({"tokens": np.arange(3)}, "tokens=.*; it must be an array of strings"),
    ({"tokens": ["a", "b", "a"]}, "has the token 'a' twice"),
    ({"token_type": np.array([3])}, "token_type=.*one for each token"),
    ({"merges": ["12"]}, "the merge '12', which lacks a space"),
    ({"merges": ["1 €"]}, "`€` out of vocabulary"),
  ],
)
def test_tokenizers_that_are_refused(changes: dict, message: str) -> None:
  with pytest.raises(ConversionError, match=message) as error:
    rebuild(letters_metadata(**changes))
  assert "model.gguf" in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"scores": "one is NaN"}, "scores=.*; it must be finite"),
    ({"token_type": "one is user-defined"}, "the user-defined token"),
    ({"tokens": "one is long"}, "of at most 256 characters"),
  ],
)
def test_sentencepiece_vocabularies_that_are_refused(changes: dict, message: str) -> None:
  metadata, _ = sentencepiece_metadata()
  (key,) = changes
  values = list(metadata[f"tokenizer.ggml.{key}"])
  values[9] = {"scores": np.nan, "token_type": 4, "tokens": "x" * 300}[key]
  other = values if key == "tokens" else np.array(values)
  with pytest.raises(ConversionError, match=message):
    rebuild(metadata | {f"tokenizer.ggml.{key}": other})


def test_a_sentencepiece_vocabulary() -> None:
  """The token ids equal those that SentencePiece computes for the stored texts."""
  metadata, texts = sentencepiece_metadata()
  tokenizer = rebuild(metadata)
  assert (tokenizer.start_ids, tokenizer.end_id) == ((1,), 2)
  assert {text: tokenizer.encode(text) for text in texts} == texts
  for text, tokens in texts.items():
    if "▁" not in text:
      assert tokenizer.decode(tokens) == (f" {text}" if text else "")


def test_another_end_token() -> None:
  assert rebuild(letters_metadata(), TokenizerChoices(end_token="12x")).end_token == "12x"
