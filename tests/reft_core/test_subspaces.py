"""Names for groups of ranks: how they are written, and what they may name."""

from __future__ import annotations

import pytest

from reft_core.errors import InvalidRequest
from reft_core.subspaces import check_subspaces, parse_ranks, parse_subspaces


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("0:4", (0, 1, 2, 3)),
        ("3", (3,)),
        ("0:2+6", (0, 1, 6)),
        (" 1:2 + 4:6", (1, 4, 5)),
    ],
)
def test_ranges_end_before_their_second_number(text: str, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["", ":", "4:", ":4", "-1", "a", "0-4", "0:4:8", "1" * 6, "٣"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"subspaces: got .*, expected ranges of ranks"):
        parse_ranks(text)


@pytest.mark.parametrize("text", ["4:4", "4:2"])
def test_ranges_without_a_rank_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="each with a rank in it"):
        parse_ranks(text)


def test_groups_have_names() -> None:
    assert parse_subspaces("tone=0:2, topic=2:4+7") == {"tone": (0, 1), "topic": (2, 3, 7)}


@pytest.mark.parametrize("text", ["", "tone", "=0:2", "tone=0:2,tone=2:4", "tone=0:2,"])
def test_groups_without_a_name_of_their_own_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected name=ranks,…, each name once"):
        parse_subspaces(text)


@pytest.mark.parametrize(
    ("subspaces", "num_ranks", "message"),
    [
        ({"a": (0, 4)}, 4, r"subspaces\.a: got \[0, 4\], expected ranks 0 to 3"),
        ({"a": ()}, 4, r"subspaces\.a: got \[\], expected ranks 0 to 3"),
        ({"a": (0,)}, 0, "expected none: a site has no ranks"),
        ({"a": (0, 1), "b": (1,)}, 4, r"subspaces: got ranks \[0, 1, 1\], expected each rank at"),
    ],
)
def test_groups_are_held_to_the_ranks_there_are(
    subspaces: dict[str, tuple[int, ...]], num_ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_subspaces(subspaces, num_ranks)
    check_subspaces({"a": (0, 2), "b": (1,)}, 3)
