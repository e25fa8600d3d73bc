"""Windows on long pages."""

from itertools import pairwise

import pytest
import torch

from dfine.config import DataConfig
from dfine.inference.windows import best_seen_here, is_long, windows_of

DATA = DataConfig(short_edges=(64,), eval_short_edge=64, max_long_edge=96)  # a window is 1.5 times as long as wide


@pytest.mark.parametrize("size", [(2110, 1000), (1000, 2110), (5000, 100), (7, 4000), (100_000, 1)])
def test_windows_cover_a_long_page_and_overlap_by_half(size: tuple[int, int]) -> None:
    assert is_long(size, DATA)
    windows = windows_of(size, DATA)
    along = int(size[0] > size[1])
    assert {(w[1 - along], w[3 - along]) for w in windows} == {(0, min(size))}  # from side to side
    starts, ends = ([window[side] for window in windows] for side in (along, along + 2))
    lengths = {end - start for start, end in zip(starts, ends, strict=True)}
    assert len(lengths) == 1
    assert lengths == {round(1.5 * min(size))} or len(windows) > 900
    assert (starts[0], ends[-1]) == (0, max(size))
    length = lengths.pop()
    assert 2 <= len(windows) <= 1001
    assert all(0 < after - start <= length / 2 + 1 for start, after in pairwise(starts))


@pytest.mark.parametrize("size", [(100, 100), (1414, 1000), (1000, 1414), (2000, 1000)])
def test_other_pages_are_one_window(size: tuple[int, int]) -> None:
    assert not is_long(size, DATA)
    assert windows_of(size, DATA) == [(0, 0, size[1], size[0])]


def test_what_is_long_depends_on_what_the_model_sees() -> None:
    assert not is_long((3000, 1000), DATA.model_copy(update={"max_long_edge": 200}))
    squashed = DATA.model_copy(update={"sizing": "squash"})
    assert is_long((3000, 1000), squashed)
    assert not is_long((1900, 1000), squashed)  # of A4 it shows less than 1.4 times as much


def test_a_box_is_left_out_where_another_window_sees_more_of_it() -> None:
    windows = [(0, 0, 100, 100), (0, 50, 100, 150), (0, 100, 100, 200)]
    whole = torch.tensor([[0, 60, 9, 90], [0, 0, 9, 50], [0, 150, 9, 200], [0, 60, 9, 100], [0, 60, 9, 140.0]])
    seen = torch.stack([best_seen_here(whole, windows, i) for i in range(3)])
    # The last but one ends where the first window does, which may have cut it; the last fits into the second alone.
    assert (
        seen.T.tolist()
        == [[True, True, False], [True, False, False], [False, False, True]] + [[False, True, False]] * 2
    )
    cut = torch.tensor([[0, 50, 9, 100], [0, 20, 9, 100.0]])  # by the first: the second begins here, sees none of it
    assert best_seen_here(cut, windows, 0).tolist() == [True, True]
    assert best_seen_here(whole[:2], windows[:1], 0).tolist() == [True, True]


def test_a_box_that_each_window_sees_a_little_nearer_to_its_own_edge_is_not_lost() -> None:
    windows = [(0, 0, 100, 100), (0, 50, 100, 150)]
    for index, box in enumerate(([0, 61, 9, 91], [0, 59, 9, 89])):
        assert best_seen_here(torch.tensor([box]).float(), windows, index).tolist() == [True]
