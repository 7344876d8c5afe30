"""Links between the documents exist, and the code of docs/op.md runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
  """The anchor that GitHub gives a heading."""
  return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_name_files_and_headings(document: Path) -> None:
  broken = []
  for name, heading in LINK.findall(CODE.sub("", document.read_text())):
    path = document.parent / name if name else document
    is_there = path.is_file()
    if is_there and heading:
      headings = HEADING.findall(CODE.sub("", path.read_text()))
      is_there = heading in map(anchor, headings)
    if not is_there:
      broken.append(f"{name}#{heading}" if heading else name)
  assert broken == []


def test_there_are_documents_with_links() -> None:
  assert len(DOCUMENTS) > 10
  assert LINK.search((ROOT / "README.md").read_text())


def test_code_of_the_page_about_the_op_runs(capsys: pytest.CaptureFixture[str]) -> None:
  """The blocks of docs/op.md run one after another, as a reader runs them."""
  names: dict = {}
  blocks = PYTHON.findall((ROOT / "docs" / "op.md").read_text())
  for block in blocks:
    exec(compile(block, "docs/op.md", "exec"), names)
  assert len(blocks) == 5
  assert names["out"].shape == (2, 64, 4, 16)
  assert abs(names["packed"][0, :30] - names["alone"][0]).max() < 1e-6
  assert names["weights"].sum(-1) == pytest.approx(1, abs=1e-5)
  printed = capsys.readouterr().out
  assert "of 2080 pairs are seen" in printed
  assert "grouped_attention" in printed
