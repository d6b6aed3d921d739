"""Threads that take turns."""

import pytest

from common.turns import in_turns


@pytest.mark.parametrize("number", [1, 3])
def test_all_come_to_a_pause_before_any_goes_on_in_the_same_order(number):
    said = []

    def work(i, pause):
        for step in range(3):
            said.append((step, i))
            pause()
        said.append((3, i))

    in_turns(work, number)
    assert said == [(step, i) for step in range(4) for i in range(number)]


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1])
def test_the_first_error_ends_all_and_is_raised(bad, step):
    ended = []

    def work(i, pause):
        try:
            for now in range(2):
                if (now, i) == (step, bad):
                    raise ValueError(i)
                pause()
            ended.append("whole")
        finally:
            ended.append(i)

    with pytest.raises(ValueError, match=str(bad)):
        in_turns(work, 3)
    assert sorted(ended) == ([0, 1, 2] if step else list(range(bad + 1)))
