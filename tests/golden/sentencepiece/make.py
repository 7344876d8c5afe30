"""Creates expected.json: a small SentencePiece vocabulary in GGUF's form, and token ids of texts.

  python -m venv made && made/bin/pip install sentencepiece
  made/bin/python tests/golden/sentencepiece/make.py

The vocabulary is trained with LLaMA 2's settings on the licence of this project.
"""

import io
import json
import pathlib

import sentencepiece

FOLDER = pathlib.Path(__file__).parent
# Values of GGUF's tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
TEXTS = [
  "",
  " ",
  "The licence grants rights.",
  "  two spaces,   three; a trailing one ",
  "naïve café, 東京 🙂 and 12345\n\tindented\r\n",
  "distribution redistribution redistributions",
  "▁ is a character too",
  "a</s>b <s> c",
]


def main() -> None:
  lines = (FOLDER.parents[2] / "LICENSE").read_text().splitlines()
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    model_type="bpe",
    vocab_size=600,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    minloglevel=2,
  )
  processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

  def kind(index: int) -> int:
    if processor.is_control(index):
      return CONTROL
    if processor.is_unknown(index):
      return UNKNOWN
    return BYTE if processor.is_byte(index) else NORMAL

  indices = range(processor.get_piece_size())
  values = {
    "tokens": [processor.id_to_piece(index) for index in indices],
    "scores": [processor.get_score(index) for index in indices],
    "token_type": [kind(index) for index in indices],
    "texts": {text: processor.encode(text) for text in TEXTS},
  }
  path = FOLDER / "expected.json"
  path.write_text(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n")
  print(path.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
