"""LongBench-E and the multi-document questions of Liu et al., on small files in their formats."""

import gzip
import json
from pathlib import Path

import pytest

from dga_jax.evaluation import longbench, lost_in_the_middle
from tests.dga_jax.evaluation.tiny import TOKENIZER


def example(**changes: object) -> dict:
  common = {"input": "who?", "context": "Some {text}.", "answers": ["red house"], "length": 100}
  return common | {"all_classes": None, "dataset": "qasper", "language": "en", "_id": "1"} | changes


def write(folder: Path, sets: dict[str, list[dict]]) -> Path:
  prompts = dict.fromkeys(sets, "Read: {context}\nAsk: {input}\nAnswer:")
  (folder / "dataset2prompt.json").write_text(json.dumps(prompts))
  (folder / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(sets, 12)))
  for name, examples in sets.items():
    (folder / f"{name}_e.jsonl").write_text("\n".join(map(json.dumps, examples)))
  return folder


def test_data_sets_are_read_with_their_prompts(tmp_path: Path) -> None:
  folder = write(tmp_path, {"trec": [example()], "qasper": [example(), example(input="what?")]})
  first, second = longbench.read_sets(folder)
  assert (first.name, second.name, first.new_tokens) == ("qasper", "trec", 12)
  assert first.prompts[1] == "Read: Some {text}.\nAsk: what?\nAnswer:"
  assert len(longbench.read_sets(folder, limit=1)[0].examples) == 1


def test_scores_by_length(tmp_path: Path) -> None:
  lengths = [
    (3999, ["red house", "blue"]),
    (4000, ["red"]),
    (7999, ["barn"]),
    (8000, ["red house"]),
  ]
  examples = [example(length=length, answers=answers) for length, answers in lengths]
  (one,) = longbench.read_sets(write(tmp_path, {"qasper": examples}))
  result = longbench.score(one, ["red house"] * 4)
  assert result["score"] == {"0-4k": 100.0, "4-8k": 33.33, "8k+": 100.0, "all": 66.67}
  assert result["examples"] == {"0-4k": 1, "4-8k": 2, "8k+": 1}


def test_a_bucket_without_examples_has_no_score(tmp_path: Path) -> None:
  (one,) = longbench.read_sets(write(tmp_path, {"qasper": [example()]}))
  assert longbench.score(one, ["red house"])["score"]["8k+"] is None


@pytest.mark.parametrize(
  ("name", "changes", "prediction", "score"),
  [
    ("trec", {"answers": ["City"], "all_classes": ["City", "Date"]}, "\nCity\nDate", 100.0),
    ("qasper", {"answers": ["city"]}, "city\ndate", 66.67),  # All lines of the answer count.
    ("samsum", {"answers": ["he left"]}, "he left\nand more", 100.0),
    ("passage_count", {"answers": ["5"]}, "5 of 6", 50.0),
    ("passage_retrieval_en", {"answers": ["Paragraph 5"]}, "Paragraph 5", 100.0),
    ("lcc", {"answers": ["return x"]}, "# now\nreturn x", 100.0),
    ("gov_report", {"answers": ["a b c."]}, "a c.", 80.0),
  ],
)
def test_scores_of_each_kind_of_task(
  name: str, changes: dict, prediction: str, score: float, tmp_path: Path
) -> None:
  (one,) = longbench.read_sets(write(tmp_path, {name: [example(**changes)]}))
  assert longbench.score(one, [prediction])["score"]["all"] == score


def test_all_thirteen_data_sets_are_known() -> None:
  assert len(longbench.DATASETS) == 13


def test_long_prompts_are_truncated_in_the_middle() -> None:
  tokens = longbench.fit(TOKENIZER, "abcdefghij", 7)
  assert TOKENIZER.decode(tokens) == "abchij"
  assert tokens[0] == TOKENIZER.end_id
  assert TOKENIZER.decode(longbench.fit(TOKENIZER, "abcdef", 7)) == "abcdef"
  with pytest.raises(ValueError, match="most is 2"):
    longbench.fit(TOKENIZER, "abcdef", 2)


def test_invalid_longbench_files_are_errors(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match=r"must have files such as qasper_e\.jsonl"):
    longbench.read_sets(tmp_path)
  folder = write(tmp_path, {"qasper": [example()]})
  (folder / "dataset2maxlen.json").write_text("{}")
  with pytest.raises(ValueError, match="has no entry 'qasper'"):
    longbench.read_sets(folder)
  write(tmp_path, {"qasper": [{"input": ""}]})
  with pytest.raises(ValueError, match="line 1, lacks context, answers, length, all_classes"):
    longbench.read_sets(folder)


def question(gold: int | None, answers: list[str]) -> dict:
  documents = [
    {"title": f"Title {i}", "text": f"Text {i}.", "isgold": i == gold, "hasanswer": i == gold}
    for i in range(3)
  ]
  return {"question": "who won?", "answers": answers, "ctxs": documents}


def test_multi_document_questions(tmp_path: Path) -> None:
  lines = [question(0, ["Ann"]), question(2, ["Bob", "Robert"]), question(2, ["Carl"])]
  with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
    file.write("\n".join(map(json.dumps, lines)))
  questions = lost_in_the_middle.read_questions(tmp_path / "q.jsonl.gz")
  assert [(one.gold, one.documents) for one in questions] == [(0, 3), (2, 3), (2, 3)]
  assert "[3] Title 2\nText 2.\n\nQuestion: who won?\nAnswer:" in questions[0].prompt
  result = lost_in_the_middle.score(questions, ["It was Ann.", "robert!", "nobody\nCarl"])
  assert [(one["gold"], one["hits"], one["samples"]) for one in result["by_place"]] == [
    (0, 1, 1),
    (2, 1, 2),
  ]
  assert (result["hits"], result["samples"]) == (2, 3)
  assert len(lost_in_the_middle.read_questions(tmp_path / "q.jsonl.gz", limit=2)) == 2


def test_questions_without_a_marked_document(tmp_path: Path) -> None:
  (tmp_path / "q.jsonl").write_text(json.dumps(question(None, ["Ann"])))
  (one,) = lost_in_the_middle.read_questions(tmp_path / "q.jsonl")
  assert lost_in_the_middle.score([one], ["Ann"])["by_place"][0]["gold"] is None


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"question": "who?"}', "line 1, is not a question: KeyError"),
    ("[]", "line 1"),
    ("", "has no question"),
  ],
)
def test_invalid_question_files_are_errors(content: str, message: str, tmp_path: Path) -> None:
  (tmp_path / "q.jsonl").write_text(content)
  with pytest.raises(ValueError, match=message):
    lost_in_the_middle.read_questions(tmp_path / "q.jsonl")
