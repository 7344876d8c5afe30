"""Tokenizers: exact round trips, streaming without split characters, saving and loading."""

import itertools
import json
import pathlib

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from dga_jax.tokenizer import END_TOKEN, FILE_NAME, Tokenizer

# All characters of UTF-8. Characters of one to four bytes are equally likely.
UNICODE = st.text(
  st.one_of(
    st.characters(max_codepoint=0x7F),
    st.characters(min_codepoint=0x80, max_codepoint=0x7FF),
    st.characters(min_codepoint=0x800, max_codepoint=0xFFFF, exclude_categories=["Cs"]),
    st.characters(min_codepoint=0x10000),
  )
)
CORPUS = ["def add(a, b):\n    return a + b\n" * 3, "naïve café, 東京 and 🙂🙂🙂 <|end|>"]


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
  return Tokenizer.byte_level() if request.param == "byte" else Tokenizer.train_bpe(CORPUS, 300)


@hypothesis.given(text=UNICODE)
def test_decoding_restores_every_text(tokenizer: Tokenizer, text: str) -> None:
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
  assert all(0 <= token < tokenizer.vocab_size for token in ids)


@hypothesis.given(data=st.data())
def test_streamed_pieces_join_to_the_text_without_split_characters(
  tokenizer: Tokenizer, data: st.DataObject
) -> None:
  text = data.draw(UNICODE)
  pieces = list(tokenizer.decode_stream(tokenizer.encode(text)))
  assert "".join(pieces) == text
  # U+FFFD indicates a split character, unless the text contains it.
  hypothesis.assume("\N{REPLACEMENT CHARACTER}" not in text)
  assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@hypothesis.given(ids=st.lists(st.integers(0, 400)))
def test_any_ids_can_be_decoded(tokenizer: Tokenizer, ids: list[int]) -> None:
  content = b"".join(map(tokenizer.token_bytes, ids))
  assert tokenizer.decode(ids) == content.decode(errors="replace")


def test_pieces_are_returned_as_soon_as_characters_are_complete() -> None:
  tokenizer = Tokenizer.byte_level()
  stream = tokenizer.decode_stream(iter(tokenizer.encode("aé")))
  assert list(itertools.islice(stream, 3)) == ["a", "", "é"]


def test_incomplete_and_invalid_bytes_are_replaced() -> None:
  tokenizer = Tokenizer.byte_level()
  assert list(tokenizer.decode_stream([0xC3, ord("x"), 0xE2, 0x82])) == [
    "",
    "\ufffdx",
    "",
    "",
    "\ufffd",
  ]


def test_text_never_encodes_to_the_end_token(tokenizer: Tokenizer) -> None:
  assert tokenizer.end_id not in tokenizer.encode(f"a{END_TOKEN}b {END_TOKEN}")
  assert tokenizer.decode([tokenizer.end_id]) == ""


def test_byte_ids_are_bytes() -> None:
  tokenizer = Tokenizer.byte_level()
  text = "".join(map(chr, range(1, 300)))
  assert tokenizer.encode(text) == list(text.encode())
  assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)


def test_encoding_a_batch_equals_encoding_each_text(tokenizer: Tokenizer) -> None:
  assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]


def test_bpe_training_is_repeatable_and_merges() -> None:
  first, second = (Tokenizer.train_bpe(iter(CORPUS), 300) for _ in range(2))
  assert first.to_json() == second.to_json()
  assert first.vocab_size == 300
  assert len(first.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_a_loaded_tokenizer_equals_the_saved_one(
  tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
  path = tokenizer.save(tmp_path / "new")
  assert [path] == list((tmp_path / "new").iterdir())
  loaded = Tokenizer.load(tmp_path / "new")
  assert loaded.to_json() == tokenizer.to_json()
  assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
  # The library does not save this property.
  assert loaded.end_id not in loaded.encode(END_TOKEN)


def test_words(tmp_path: pathlib.Path) -> None:
  tokenizer = Tokenizer.words(["k0", "v0"])
  assert tokenizer.encode(" k0  v0\nk0") == [1, 2, 1]
  assert tokenizer.decode([1, 2, 0]) == "k0 v0 "
  assert tokenizer.encode("") == []
  tokenizer.save(tmp_path)
  assert Tokenizer.load(tmp_path).decode([2]) == "v0 "
  with pytest.raises(ValueError, match="'k7'"):
    tokenizer.encode("k0 k7")


def sentencepiece() -> tokenizers.Tokenizer:
  """A tokenizer like SentencePiece's: "▁" replaces spaces, bytes encode unknown characters."""
  words = ["<s>", "</s>", "▁", "a", "b", "▁a", "ab"] + [f"<0x{byte:02X}>" for byte in range(256)]
  vocabulary = {word: index for index, word in enumerate(words)}
  backend = tokenizers.Tokenizer(
    models.BPE(vocabulary, [("▁", "a"), ("a", "b")], byte_fallback=True)
  )
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
  )
  backend.add_special_tokens(["<s>", "</s>"])
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  return backend


def test_a_sentencepiece_tokenizer_of_another_model(tmp_path: pathlib.Path) -> None:
  tokenizer = Tokenizer.imported(sentencepiece(), "</s>")
  assert (tokenizer.start_ids, tokenizer.end_id) == ((0,), 1)
  text = "ab é a\nb</s>"
  ids = tokenizer.encode(text)
  assert 1 not in ids
  assert tokenizer.decode(ids) == f" {text}"
  tokenizer.save(tmp_path)
  loaded = Tokenizer.load(tmp_path)
  assert loaded.encode(text) == ids
  assert (loaded.start_ids, loaded.end_id) == ((0,), 1)
  # Other programs read the library's own JSON form.
  plain = tokenizers.Tokenizer.from_str(tokenizer.to_plain_json())
  assert plain.encode("ab").ids == [0, *tokenizer.encode("ab")]


def test_a_byte_level_tokenizer_of_another_model() -> None:
  backend = tokenizers.Tokenizer.from_str(Tokenizer.byte_level().to_plain_json())
  backend.add_special_tokens(["<｜stop｜>"])
  backend.enable_truncation(2)
  tokenizer = Tokenizer.imported(backend, "<|end|>")
  assert tokenizer.start_ids == ()
  assert tokenizer.encode("abc") == list(b"abc")
  assert tokenizer.decode([97, 257, 256, 98]) == "a<｜stop｜>b"


@pytest.mark.parametrize(
  "decoder",
  [
    decoders.WordPiece(),
    decoders.Metaspace(replacement="_"),
    decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback()]),
    decoders.Sequence([decoders.ByteFallback(), decoders.CTC()]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Strip("a", 1)]),
    decoders.Sequence([decoders.Replace("a", "b"), decoders.ByteLevel()]),
  ],
)
def test_an_unknown_decoder_is_refused(decoder: decoders.Decoder) -> None:
  backend = sentencepiece()
  backend.decoder = decoder
  with pytest.raises(ValueError, match=r"has the decoder .*must be"):
    Tokenizer.imported(backend, "</s>")


def test_stop_ids_are_kept(tmp_path: pathlib.Path) -> None:
  """The end token is the first stop id. Stop ids may have no text."""
  backend = tokenizers.Tokenizer.from_str(Tokenizer.byte_level().to_plain_json())
  tokenizer = Tokenizer.imported(backend, "<|end|>", stop_ids=[7, 256, 300, 7])
  assert tokenizer.stop_ids == (256, 7, 300)
  tokenizer.save(tmp_path)
  assert Tokenizer.load(tmp_path).stop_ids == (256, 7, 300)
  assert Tokenizer.byte_level().stop_ids == (256,)
  older = json.loads(tokenizer.to_json())
  del older["dga_jax"]["stop"]
  assert Tokenizer.from_json(json.dumps(older)).stop_ids == (256,)


def test_end_and_stop_tokens_are_special_where_the_files_do_not_say_so() -> None:
  backend = tokenizers.Tokenizer.from_str(Tokenizer.byte_level().to_plain_json())
  backend.add_tokens(["<end>", "<stop>", "<word>"])
  tokenizer = Tokenizer.imported(backend, "<end>", stop_ids=[258])
  text = "a<end>b<stop>"
  assert tokenizer.encode(text) == list(text.encode())
  assert tokenizer.encode("<word>") == [259]
  assert Tokenizer.from_json(tokenizer.to_json()).encode(text) == list(text.encode())


def test_an_end_token_that_text_encodes_to_is_refused() -> None:
  backend = tokenizers.Tokenizer.from_str(Tokenizer.byte_level().to_plain_json())
  with pytest.raises(ValueError, match="encodes the text 'a' to its end token"):
    Tokenizer.imported(backend, "a")
  with pytest.raises(ValueError, match=r"'<\|end\|>', which is no word"):
    Tokenizer.words(["a"]).encode(f"a {END_TOKEN}")


def test_a_template_with_tokens_after_a_text_is_refused() -> None:
  backend = sentencepiece()
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
  )
  with pytest.raises(ValueError, match=r"puts \['</s>'\] behind every text"):
    Tokenizer.imported(backend, "</s>")


def test_a_fixed_length_does_not_reach_the_start_tokens() -> None:
  backend = sentencepiece()
  backend.enable_padding(direction="left", length=16, pad_id=1, pad_token="</s>")
  backend.enable_truncation(2)
  tokenizer = Tokenizer.imported(backend, "</s>")
  assert tokenizer.start_ids == (0,)
  assert tokenizer.encode("ab") == Tokenizer.imported(sentencepiece(), "</s>").encode("ab")


def test_a_token_that_is_not_spelled_in_bytes_is_text() -> None:
  values = json.loads(Tokenizer.byte_level().to_json())
  values["model"]["vocab"]["東"] = 256
  tokenizer = Tokenizer.from_json(json.dumps(values))
  assert tokenizer.end_id == 257
  assert tokenizer.decode([256, 97]) == "東a"


def test_a_text_that_cannot_be_encoded_is_refused() -> None:
  with pytest.raises(ValueError, match="The text cannot be encoded"):
    Tokenizer.byte_level().encode("\ud800")


def test_invalid_tokenizer_files_are_errors_with_the_path(tmp_path: pathlib.Path) -> None:
  with pytest.raises(FileNotFoundError, match=FILE_NAME):
    Tokenizer.load(tmp_path)
  whole = Tokenizer.byte_level().to_json()
  other = whole.replace(f'"end": "{END_TOKEN}"', '"end": "<|other|>"')
  assert other != whole
  broken = [
    json.dumps(json.loads(whole) | {"dga_jax": ours})
    for ours in (
      None,
      [],
      {"end": 3, "start": []},
      {"end": END_TOKEN},
      {"end": END_TOKEN, "start": ["x" * 9]},
      {"end": END_TOKEN, "start": [], "stop": [-1]},
      {"end": END_TOKEN, "start": [], "stop": ["x"]},
      {"end": END_TOKEN, "start": [], "stop": 5},
    )
  ]
  huge = json.loads(whole)
  huge["model"]["vocab"]["xx"] = 2**31
  twice = json.loads(whole)
  twice["model"]["vocab"]["xx"] = 97
  charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
  panic = json.dumps(json.loads(whole) | {"normalizer": charsmap})
  deep = "[" * 100_000
  broken += [json.dumps(huge), json.dumps(twice), panic, deep]
  for content in ("", "{}", whole[: len(whole) // 2], other, *broken):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=FILE_NAME):
      Tokenizer.load(tmp_path)


def test_too_small_a_vocabulary_is_refused() -> None:
  with pytest.raises(ValueError, match="vocab_size is 256"):
    Tokenizer.train_bpe(CORPUS, 256)
