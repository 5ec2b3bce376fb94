from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reft_core.engine.deadlines import Deadlines


def test_the_overdue_come_earliest_first_and_once() -> None:
    deadlines = Deadlines()
    for request_id, due in {"late": 9.0, "a": 2.0, "b": 1.0, "gone": 1.5}.items():
        deadlines.add(request_id, due)
    deadlines.remove("gone")
    deadlines.remove("never was")
    assert deadlines.pop_overdue(0.9) == []
    assert deadlines.pop_overdue(2.0) == ["b", "a"]
    assert deadlines.pop_overdue(2.0) == []
    assert deadlines.pop_overdue(99.0) == ["late"]


def test_an_id_that_comes_again_has_its_new_deadline() -> None:
    deadlines = Deadlines()
    deadlines.add("again", 1.0)
    deadlines.remove("again")
    deadlines.add("again", 5.0)
    assert deadlines.pop_overdue(2.0) == []
    assert deadlines.pop_overdue(5.0) == ["again"]


def test_requests_that_end_in_time_leave_nothing_behind() -> None:
    """A server whose requests take a second may give each ten minutes."""
    deadlines = Deadlines()
    for index in range(10_000):
        deadlines.add(str(index), 600.0 + index)
        if index >= 10:
            deadlines.remove(str(index - 10))
        assert len(deadlines) <= 2 * 11 + 64 + 1
    assert deadlines.pop_overdue(1e9) == [str(index) for index in range(9_990, 10_000)]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers(0, 20))), max_size=60
    )
)
def test_as_a_plain_dict_would(turns: list[tuple[str, int | None]]) -> None:
    """None removes an id; a number adds it anew, and then makes that time pass."""
    deadlines, plain = Deadlines(), {}
    for now, (request_id, due) in enumerate(turns):
        if request_id in plain:
            deadlines.remove(request_id)
            del plain[request_id]
        if due is not None:
            deadlines.add(request_id, float(due))
            plain[request_id] = due
        found = deadlines.pop_overdue(now)
        assert sorted(found) == sorted(name for name, due in plain.items() if due <= now)
        for name in found:
            del plain[name]
