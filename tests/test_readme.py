"""The Python code blocks of README.md run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_of_the_readme_runs(block: str) -> None:
  exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_code() -> None:
  assert BLOCKS
