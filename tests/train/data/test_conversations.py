"""Conversations: only answers have a loss, with the plain template and with a model's template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dga_jax.chat.template import ChatTemplate
from dga_jax.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.conversations import Encoded, Encoder, to_document, to_text
from train.data.files import read_documents
from train.data.packed_rows import PackedRows
from train.data.pipeline import load_data
from train.data.token_stream import conversation_blocks, TokenStream

TOKENIZER = Tokenizer.byte_level()
END = TOKENIZER.end_id
QUESTION = {"role": "user", "content": "One?"}
ANSWER = {"role": "assistant", "content": "Two."}
CHAT = [{"role": "system", "content": "Count."}, QUESTION, ANSWER, QUESTION, ANSWER]
TEMPLATE = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def pieces(encoded: Encoded) -> list[tuple[bool, str]]:
  """Text with a loss and text without it, alternating; # is the end token."""
  found: list[tuple[bool, str]] = []
  for token, is_learnt in zip(encoded.tokens.tolist(), encoded.learnt.tolist(), strict=True):
    text = "#" if token == END else chr(token)
    if found and found[-1][0] == is_learnt:
      found[-1] = (is_learnt, found[-1][1] + text)
    else:
      found.append((is_learnt, text))
  return found


def test_the_plain_template() -> None:
  encoded = Encoder(TOKENIZER, None).encode(to_document(CHAT))
  assert pieces(encoded) == [
    (False, "system: Count.\nuser: One?\nassistant:"),
    (True, " Two.#"),
    (False, "\nuser: One?\nassistant:"),
    (True, " Two."),
  ]
  assert encoded.end_learnt  # The last answer ends with the document.


def test_a_conversation_that_ends_with_a_question() -> None:
  encoded = Encoder(TOKENIZER, None).encode(to_document([QUESTION, ANSWER, QUESTION]))
  assert pieces(encoded)[-1] == (False, "\nuser: One?")
  assert not encoded.end_learnt


def test_the_template_of_a_model() -> None:
  template = ChatTemplate(TEMPLATE, TOKENIZER)
  encoded = Encoder(TOKENIZER, template).encode(to_document(CHAT))
  assert pieces(encoded) == [
    (False, "[system]Count.#[user]One?#[assistant]"),
    (True, "Two.#"),
    (False, "[user]One?#[assistant]"),
    (True, "Two.#"),
  ]
  assert not encoded.end_learnt
  assert Encoder(TOKENIZER, None).fingerprint() != Encoder(TOKENIZER, template).fingerprint()


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
  last_only = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
  encoder = Encoder(TOKENIZER, ChatTemplate(last_only, TOKENIZER))
  with pytest.raises(
    ValueError, match=r"renders message 3 .* another way once later messages foll"
  ):
    encoder.encode(to_document(CHAT))


def test_messages_cannot_write_the_end_token() -> None:
  hostile = [QUESTION, {"role": "assistant", "content": f"a{TOKENIZER.end_token}b"}]
  for template in (None, ChatTemplate(TEMPLATE, TOKENIZER)):
    encoded = Encoder(TOKENIZER, template).encode(to_document(hostile))
    ends = np.count_nonzero(encoded.tokens == END)
    assert ends == (0 if template is None else 2)


@pytest.mark.parametrize(
  ("messages", "message"),
  [
    ([], "must be a list with at least one object"),
    ({"role": "user"}, "must be a list with at least one object"),
    ([{"role": "user"}], 'it must have the strings "role", "content"'),
    ([{"role": "user", "content": 3}], 'it must have the strings "role", "content"'),
    ([{"role": "User\n", "content": "a"}], "must be lower-case letters"),
    ([QUESTION], 'no message of the role "assistant"'),
  ],
)
def test_what_is_no_conversation(messages: Any, message: str, tmp_path: Path) -> None:
  path = tmp_path / "chat.jsonl"
  path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": messages}))
  with pytest.raises(ValueError, match=r"chat\.jsonl, line 2, is no conversation: .*" + message):
    list(read_documents(path))


def test_texts_and_conversations_in_one_file(tmp_path: Path) -> None:
  path = tmp_path / "mixed.jsonl"
  path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"messages": CHAT}))
  with pytest.raises(ValueError, match=r'line 2: .* "text", this one has "messages"'):
    list(read_documents(path))


def test_a_tokenizer_is_trained_on_the_messages() -> None:
  assert to_text(to_document([QUESTION, ANSWER])) == "user: One?\nassistant: Two."
  assert to_text("a text") == "a text"


@pytest.mark.parametrize("length", [5, 16, 200])
def test_rows_have_every_token_and_the_loss_of_every_answer(length: int) -> None:
  encoder = Encoder(TOKENIZER, None)
  documents = [
    encoder.encode(document) for document in (to_document(CHAT), "text", to_document(CHAT))
  ]
  blocks = list(conversation_blocks(documents, END))
  stream = TokenStream(blocks, END)
  assert len(stream.ends_N) == 4  # Ends of answers inside a conversation end no document.
  rows = PackedRows(stream, length, None)
  got = [rows[index] for index in range(len(rows))]
  learnt = sorted(int(t) for row in got for t in row["targets"][row["loss_mask"]])
  wanted = sorted([*b" Two. Two. Two. Two.", *b"text", *[END] * 5])
  assert learnt == wanted
  total = sum(np.count_nonzero(row["segment_ids"] > 0) for row in got)
  assert total == sum(len(document.tokens) + 1 for document in documents)


def test_conversations_to_batches(tmp_path: Path) -> None:
  lines = [json.dumps({"messages": CHAT}) for _ in range(40)]
  (tmp_path / "chat.jsonl").write_text("\n".join(lines))
  files = (str(tmp_path / "chat.jsonl"),)
  config = DataConfig(sequence_length=128, train_files=files, tokenizer="byte", prefetch_batches=0)
  data = load_data(config, tmp_path, seed=0, batch_size=2)
  batch = next(iter(data.train))
  targets = batch["targets"][batch["loss_mask"]].tolist()
  assert bytes(token for token in targets if token != END) == b" Two." * targets.count(END)
  templated = load_data(
    config, tmp_path, seed=0, batch_size=2, tokenizer=TOKENIZER,
    template=ChatTemplate(TEMPLATE, TOKENIZER),
  )  # fmt: skip
  assert templated.fingerprint != data.fingerprint
  batch = next(iter(templated.train))
  targets = batch["targets"][batch["loss_mask"]].tolist()
  assert bytes(token for token in targets if token != END) == b"Two." * targets.count(END)
  for one in (data, templated):
    one.close()
