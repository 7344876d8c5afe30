"""The tokenizer of a Hugging Face folder: padding, begin and end tokens, stop ids, conflicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from dga_jax.checkpoint import load_model, load_tokenizer
from dga_jax.conversion.checkpoint_reader import NO_CHOICES, TokenizerChoices
from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.generation import generate, Sampling
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.conversion.folders import change_json, copy_of, import_folder, set_keys

TEMPLATE = {
  "begin": "<begin> $A",
  "end": "$A <end>",
  "both": "<begin> $A <end>",
  "none": "$A",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  return copy_of("llama3", tmp_path)


def read(folder: Path, choices: TokenizerChoices = NO_CHOICES) -> Tokenizer:
  return HuggingFaceFolder(folder).tokenizer(choices)


def set_template(folder: Path, name: str) -> None:
  processor = processors.TemplateProcessing(
    single=TEMPLATE[name], special_tokens=[("<begin>", 0), ("<end>", 2)]
  )
  set_keys(folder / "tokenizer.json", post_processor=json.loads(processor.__getstate__()))


def test_fixed_padding_and_truncation_change_no_text(folder: Path) -> None:
  expected = read(folder)
  change_json(
    folder / "tokenizer.json",
    lambda values: values.update(
      padding={
        "strategy": {"Fixed": 16},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<other>",
      },
      truncation={
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
      },
    ),
  )
  got = read(folder)
  assert got.start_ids == expected.start_ids == (0,)
  assert got.encode("the cat and the axe") == expected.encode("the cat and the axe")
  assert got.to_json() == expected.to_json()


@pytest.mark.parametrize(
  ("template", "stated", "choice", "start_ids"),
  [
    ("begin", None, None, (0,)),
    ("begin", True, None, (0,)),
    ("begin", True, False, ()),
    ("begin", False, True, (0,)),
    ("begin", False, False, ()),
    ("none", None, None, ()),
    ("none", False, None, ()),
    ("none", True, True, (0,)),
    ("none", True, False, ()),
    ("none", None, True, (0,)),
  ],
)
def test_the_begin_token(
  template: str, stated: bool | None, choice: bool | None, start_ids: tuple, folder: Path
) -> None:
  set_template(folder, template)
  if stated is not None:
    set_keys(folder / "tokenizer_config.json", add_bos_token=stated)
  tokenizer = read(folder, TokenizerChoices(add_bos_token=choice))
  assert tokenizer.start_ids == start_ids
  # The exported tokenizer adds the same tokens in other programs.
  plain = json.loads(tokenizer.to_plain_json())["post_processor"]["single"]
  assert [list(piece) for piece in plain] == [["SpecialToken"]] * len(start_ids) + [["Sequence"]]


@pytest.mark.parametrize(
  ("template", "keys", "message"),
  [
    ("none", {"add_bos_token": True}, "add_bos_token=true, but .* does not put"),
    ("begin", {"add_bos_token": False}, "add_bos_token=false, but .* puts a begin token"),
    ("begin", {"add_bos_token": 1}, "add_bos_token=1; it must be true or false"),
    ("begin", {"add_eos_token": True}, "behind every text.*--noadd_eos_token"),
    ("end", {}, "behind every text.*--noadd_eos_token"),
    ("both", {"add_eos_token": False}, "behind every text.*--noadd_eos_token"),
    ("begin", {"add_prefix_space": True}, "add_prefix_space=True; it must be false, as in"),
    ("begin", {"eos_token": 3}, "eos_token=3; it must be a string"),
    ("begin", {"eos_token": {"content": None, "id": 2}, "x": 1}, None),
    ("begin", {"eos_token": "<zz>"}, "lacks the token '<zz>'"),
    ("begin", {"added_tokens_decoder": {"3": {"content": "<new>"}}}, "the token '<new>' with id"),
    ("begin", {"added_tokens_decoder": {"3": {"content": "<end>"}}}, "the token '<end>' with id"),
    ("begin", {"added_tokens_decoder": {"2": {"content": "<end>"}}}, None),
    ("begin", {"added_tokens_decoder": {"x": []}}, r"the token None with id|the token \[\] with"),
    ("begin", {"added_tokens_decoder": "x"}, "added_tokens_decoder='x'; it must be an object"),
  ],
)
def test_tokenizer_config_must_agree_with_the_tokenizer(
  template: str, keys: dict[str, Any], message: str | None, folder: Path
) -> None:
  set_template(folder, template)
  set_keys(folder / "tokenizer_config.json", **keys)
  if message is None:
    assert read(folder).end_token == "<end>"
    return
  with pytest.raises(ConversionError, match=message) as error:
    read(folder)
  assert str(folder) in str(error.value)


@pytest.mark.parametrize("template", ["end", "both"])
def test_an_end_token_after_every_text_can_be_switched_off(template: str, folder: Path) -> None:
  set_template(folder, template)
  tokenizer = read(folder, TokenizerChoices(add_eos_token=False))
  assert tokenizer.start_ids == ((0,) if template == "both" else ())
  assert len(json.loads(tokenizer.to_plain_json())["post_processor"]["single"]) == 1 + len(
    tokenizer.start_ids
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda v: v["model"].update(dropout=0.1), "dropout=0.1; it must be null or 0"),
    (lambda v: v.pop("model"), "has no model"),
    (lambda v: v.update(decoder={"type": "WordPiece", "prefix": "#", "cleanup": True}), "decoder"),
    (lambda v: v["post_processor"].update(special_tokens={}), "tokenizer.json"),
    (
      lambda v: v.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
      "is damaged: Precompiled",
    ),
    (lambda v: v["model"]["vocab"].update({"zz": 2**31}), "has ids up to 2147483648"),
    (lambda v: v["model"].update(vocab=[]), "is damaged"),
    (lambda v: v["model"]["vocab"].pop("<end>"), "token '<end>' has the id 2, but .* gives it 33"),
    (lambda v: v["model"]["vocab"].update(th=5), "gives two tokens the same id"),
  ],
)
def test_tokenizers_that_are_refused(
  change: Any, message: str, folder: Path, tmp_path: Path
) -> None:
  change_json(folder / "tokenizer.json", change)
  with pytest.raises(ConversionError, match=message) as error:
    import_folder(folder, tmp_path / "run")
  assert str(folder) in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("config", "generation", "stop_ids"),
  [
    (None, None, (2,)),
    (2, None, (2,)),
    ([2, 3], None, (2, 3)),
    (3, [2, 9], (2, 3, 9)),
    (None, 50, (2, 50)),  # The embedding has a row 50, but the tokenizer has no such token.
  ],
)
def test_every_end_token_of_the_files_becomes_a_stop_id(
  config: Any, generation: Any, stop_ids: tuple, folder: Path, tmp_path: Path
) -> None:
  set_keys(folder / "config.json", eos_token_id=config)
  if generation is not None:
    set_keys(folder / "generation_config.json", eos_token_id=generation)
  import_folder(folder, tmp_path / "run")
  assert load_tokenizer(tmp_path / "run").stop_ids == stop_ids


def test_a_generation_stops_at_each_stop_id(folder: Path, tmp_path: Path) -> None:
  """With the third token of a continuation as a stop id, the continuation has two tokens."""
  import_folder(folder, tmp_path / "plain", dtype="float32")
  model, _, tokenizer = load_model(tmp_path / "plain")
  greedy = Sampling(temperature=0.0)
  prompt = [[*tokenizer.start_ids, *tokenizer.encode("the axe")]]
  (tokens,) = generate(model, prompt, max_new_tokens=6, sampling=greedy).tokens
  third = tokens[2]
  assert third not in tokens[:2]
  set_keys(folder / "generation_config.json", eos_token_id=[2, third])
  import_folder(folder, tmp_path / "stopping", dtype="float32")
  model, _, tokenizer = load_model(tmp_path / "stopping")
  (stopped,) = generate(
    model, prompt, max_new_tokens=6, sampling=greedy, stop_ids=tokenizer.stop_ids
  ).tokens
  assert stopped == tokens[:2]


@pytest.mark.parametrize("ids", [64, -1, "2", [2, None], [2.0], True, {}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_invalid_end_token_ids_are_errors(ids: Any, name: str, folder: Path) -> None:
  set_keys(folder / name, eos_token_id=ids)
  with pytest.raises(ConversionError, match=f"{name} has eos_token_id=.*from 0 to 63"):
    read(folder)


def test_a_missing_damaged_or_too_large_tokenizer_is_an_error(folder: Path, tmp_path: Path) -> None:
  path = folder / "tokenizer.json"
  whole = path.read_text()
  path.write_text(whole[:100])
  with pytest.raises(ConversionError, match=r"tokenizer\.json is damaged"):
    import_folder(folder, tmp_path / "run")
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*AutoTokenizer"):
    import_folder(folder, tmp_path / "run")
  path.write_text(whole)
  (folder / "tokenizer_config.json").unlink()
  set_keys(folder / "config.json", eos_token_id=None)
  with pytest.raises(ConversionError, match="--end_token"):
    import_folder(folder, tmp_path / "run")
  set_keys(folder / "config.json", eos_token_id=[3, 2])
  import_folder(folder, tmp_path / "run")
  assert load_tokenizer(tmp_path / "run").stop_ids == (3, 2)
  choices = TokenizerChoices(end_token="<begin>")
  import_folder(folder, tmp_path / "chosen", choices=choices)
  assert load_tokenizer(tmp_path / "chosen").stop_ids == (0, 3, 2)

  words = json.loads(whole)
  words["model"]["vocab"] |= {f"word{i}": 34 + i for i in range(40)}
  path.write_text(json.dumps(words))
  with pytest.raises(ConversionError, match=r"tokenizer has 74 tokens.*embedding has 64 rows"):
    import_folder(folder, tmp_path / "other")


def test_the_vocabulary_size_of_ids_with_gaps_is_the_largest_plus_one(folder: Path) -> None:
  change_json(folder / "tokenizer.json", lambda v: v["model"]["vocab"].update({"zz": 60}))
  tokenizer = read(folder)
  assert tokenizer.vocab_size == 61
  assert tokenizer.token_bytes(50) == "\N{REPLACEMENT CHARACTER}".encode()
  assert np.array(tokenizer.encode("the axe")).max() < 61
