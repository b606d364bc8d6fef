"""What may be committed, whatever the order in which messages end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.kafka.offsets import Lane


@given(st.lists(st.integers(1, 5), max_size=60), st.randoms(use_true_random=False))
def test_the_beginning_without_a_gap_and_no_more(steps: list[int], random: object) -> None:
    """Offsets have gaps (compaction, transactions); ends come in any order."""
    offsets = [sum(steps[: n + 1]) for n in range(len(steps))]
    order = list(offsets)
    random.shuffle(order)  # type: ignore[attr-defined]
    lane = Lane("requests", 0)
    for offset in offsets:
        lane.begin(offset)
    assert lane.news is None
    ended: set[int] = set()
    for offset in order:
        lane.done(offset)
        ended.add(offset)
        settled = next((n for n, o in enumerate(offsets) if o not in ended), len(offsets))
        assert lane.open == len(offsets) - settled
        assert lane.news == (offsets[settled - 1] + 1 if settled else None)
    lane.committed = lane.news
    assert lane.news is None
