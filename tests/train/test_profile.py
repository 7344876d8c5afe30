"""The flag --profile. test_setup.py runs the trainer with a profile."""

import pytest

from train.profile import ProfiledSteps


@pytest.mark.parametrize(("text", "first", "last"), [("3:7", 3, 7), ("4", 4, 4), ("12:12", 12, 12)])
def test_a_range_of_steps_is_parsed(text: str, first: int, last: int) -> None:
  assert ProfiledSteps.parse(text) == ProfiledSteps(first, last)


@pytest.mark.parametrize("text", ["7:3", "0:3", "", "3-7", "1:2:3", ":4"])
def test_invalid_ranges_are_errors(text: str) -> None:
  with pytest.raises(ValueError, match=rf"--profile is '{text}'; it must be N:M"):
    ProfiledSteps.parse(text)
