"""Rules for every file under version control: length, hosts, machine paths, pinned packages."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
URL_HOST = re.compile(r"https?://([\w.-]+)")
# The allowed hosts: papers, licences and the local machine.
HOSTS = {"arxiv.org", "www.apache.org", "127.0.0.1", "localhost"}
MACHINE_PATH = re.compile(r"(?<![\w.}$)])/(?:root|home|Users|work|opt|mnt)/\w")
TICKET = re.compile(r"\b(?:issue|PR|pull request) #?\d", re.IGNORECASE)
PINNED = re.compile(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", re.DOTALL)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
  """The text of each file that git tracks or would add, by path."""
  command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
  try:
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("not a git checkout")
  paths = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
  return {name: (ROOT / name).read_text(errors="replace") for name in paths}


def matches(files: dict[str, str], pattern: re.Pattern[str]) -> list[tuple[str, str]]:
  return [(name, found) for name, text in files.items() for found in pattern.findall(text)]


def test_code_files_are_short(files: dict[str, str]) -> None:
  code = {name: text for name, text in files.items() if name.endswith(".py") or name == "workspace"}
  lines = {name: text.count("\n") for name, text in code.items()}
  assert lines
  assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_urls_name_only_papers_and_licences(files: dict[str, str]) -> None:
  assert [found for found in matches(files, URL_HOST) if found[1] not in HOSTS] == []


def test_requirements_are_pinned_by_hash_and_name_no_source(files: dict[str, str]) -> None:
  entries = re.split(r"\n(?=\S)", files["requirements.txt"])
  assert len(entries) > 50
  assert [entry for entry in entries if not PINNED.match(entry)] == []
  assert "://" not in files["requirements.txt"]


def test_no_absolute_path_of_a_machine(files: dict[str, str]) -> None:
  assert matches(files, MACHINE_PATH) == []


def test_no_ticket_numbers(files: dict[str, str]) -> None:
  """A comment must state its reason itself, without a reference to a tracker."""
  sources = {name: text for name, text in files.items() if name.endswith((".py", ".md"))}
  assert matches(sources, TICKET) == []
