"""The loop that stands for many small tests: no failure hides another one."""

import pytest
from support.cases import every


def test_every_case_runs_and_all_that_fail_are_told():
    seen = []

    def check(number):
        seen.append(number)
        assert number % 2, f"{number} is even"
        if number == 3:
            with pytest.raises(KeyError):
                pass

    with pytest.raises(pytest.fail.Exception) as failed:
        every({"one": 1, "two": 2, "three": 3, "four": 4}, check)
    assert seen == [1, 2, 3, 4]
    told = str(failed.value)
    assert "3 of 4 cases" in told and "two (line" in told and "2 is even" in told
    assert "three (line" in told and "DID NOT RAISE" in told and "four (line" in told and "one (" not in told


def test_no_case_is_a_failure():
    with pytest.raises(AssertionError, match="no case"):
        every([], lambda case: None)
