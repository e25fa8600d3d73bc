"""Pictures of pages with named boxes."""

import numpy as np
import pytest

from dfine.inference.pictures import colour, draw, grid

NAMES = ["text", "table", "figure"]


def paper(height: int = 200, width: int = 300) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def label_areas(page: np.ndarray, boxes: list[list[float]], names: list[str] = NAMES) -> list[list[int]]:
    """x1, y1, x2, y2 of the label of each box, of which each has its own class, without what covers the box's line."""
    labels, corners = np.arange(len(boxes)), np.array(boxes, dtype=np.float64)
    named, nameless = draw(page, labels, corners, names), draw(page, labels, corners, [""] * len(boxes))
    areas = []
    for label in labels:
        y, x = np.nonzero((named != nameless).any(-1) & (named == colour(label)).all(-1))
        areas.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return areas


def overlap(a: list[float] | list[int], b: list[float] | list[int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# Boxes


def test_boxes_are_drawn_in_the_colour_of_their_class_and_the_page_stays_as_it_is() -> None:
    page = paper()
    boxes = np.array([[10.0, 20.0, 90.0, 80.0], [30.0, 100.0, 140.0, 190.0]])
    drawn = draw(page, np.array([0, 2]), boxes, NAMES, np.array([0.9, 0.4]))
    assert (page == 255).all()
    assert drawn[80, 50].tolist() == list(colour(0))
    assert drawn[150, 29].tolist() == list(colour(2))
    assert (drawn[:, 200:] == 255).all()


def test_inside_a_box_black_stays_black_and_white_gets_a_light_tint_of_the_class() -> None:
    page = paper()
    page[95:105, 100:200] = 0
    drawn = draw(page, np.array([1]), np.array([[50.0, 50.0, 250.0, 150.0]]), NAMES)
    assert (drawn[95:105, 100:200] == 0).all()
    tint = drawn[60:90, 60:240].reshape(-1, 3)
    assert (tint == tint[0]).all()
    assert 200 < tint.min() < 250
    assert tint[0].argmax() == np.argmax(colour(1))


def test_a_small_box_is_seen_in_a_large_one_whatever_their_order() -> None:
    boxes = np.array([[120.0, 80.0, 180.0, 120.0], [20.0, 20.0, 280.0, 180.0]])
    first, last = (draw(paper(), np.array([0, 1])[order], boxes[order], ["", ""]) for order in ([0, 1], [1, 0]))
    assert (first == last).all()
    assert first[100, 119].tolist() == list(colour(0))
    assert [first[100, x].argmax() for x in (150, 50)] == [np.argmax(colour(0)), np.argmax(colour(1))]


def test_a_page_without_boxes_is_copied() -> None:
    page = paper()
    drawn = draw(page, np.zeros(0, np.int64), np.zeros((0, 4)), NAMES, legend=True)
    assert (drawn == page).all()
    assert not np.shares_memory(drawn, page)


def test_the_classes_of_a_large_data_set_have_different_colours_dark_enough_for_white_text() -> None:
    colours = np.array([colour(label) for label in range(20)])
    assert len(np.unique(colours, axis=0)) == 20
    linear = np.where(colours <= 10, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    contrast = 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)  # WCAG 2.2
    assert contrast.min() >= 4.5


# Labels


def test_a_label_is_above_its_box() -> None:
    ((x1, _, x2, y2),) = label_areas(paper(), [[100, 80, 200, 120]])
    assert 70 <= y2 <= 80
    assert 95 <= x1 < x2 <= 205


def test_a_label_is_below_a_box_at_the_upper_edge() -> None:
    assert label_areas(paper(), [[100, 3, 200, 60]])[0][1] >= 60


def test_a_label_is_beside_a_box_as_high_as_the_page() -> None:
    assert label_areas(paper(), [[100, 0, 200, 200]])[0][2] <= 100


def test_a_label_is_inside_a_box_as_large_as_the_page() -> None:
    x1, y1, x2, y2 = label_areas(paper(), [[0, 0, 300, 200]])[0]
    assert x1 <= 2
    assert y1 <= 2
    assert x2 > 10
    assert y2 > 8


@pytest.mark.parametrize("gap", [0, 5, 15])
def test_labels_of_lines_below_each_other_hide_neither_a_line_nor_each_other(gap: int) -> None:
    boxes: list[list[float]] = [[80, 20 + line * (14 + gap), 200, 34 + line * (14 + gap)] for line in range(6)]
    areas = label_areas(paper(), boxes, ["text"] * 6)
    for i, area in enumerate(areas):
        assert not any(overlap(area, box) for box in boxes)
        assert not any(overlap(area, other) for other in areas[:i])


def test_a_label_that_can_hide_white_space_hides_no_text() -> None:
    page = paper()
    page[64:79:2, 100:180] = 0  # just above the box, on the left
    ((x1, _, _, y2),) = label_areas(page, [[100, 80, 240, 120]])
    assert x1 >= 180
    assert y2 <= 80


def test_a_label_hides_other_text_rather_than_its_own() -> None:
    page = paper()
    page[:60, 60:240] = 0
    page[:30, 100:200] = 255
    assert not overlap(label_areas(page, [[100, 0, 200, 30]])[0], [100, 0, 200, 30])


def test_labels_of_one_box_do_not_hide_each_other() -> None:
    areas = label_areas(paper(), [[100, 80, 200, 120]] * 3, ["text"] * 3)
    assert not any(overlap(areas[i], areas[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_label_just_above_another_box_is_that_ones() -> None:
    first, second = label_areas(paper(), [[100, 2, 200, 60], [100, 76, 200, 130]])
    assert first[1] < 60  # below the first there is room for one label, which people would take for the second's
    assert 60 <= second[1] < second[3] <= 76


@pytest.mark.parametrize("x", [-20, 0, 270, 290])
@pytest.mark.parametrize("y", [-8, 0, 180, 195])
def test_no_label_leaves_the_picture(x: int, y: int) -> None:
    (whole,), (area,) = label_areas(paper(), [[100, 80, 200, 120]]), label_areas(paper(), [[x, y, x + 30, y + 20]])
    assert area[2] - area[0] == whole[2] - whole[0]
    assert abs((area[3] - area[1]) - (whole[3] - whole[1])) <= 1  # more or less of it is on the box's line


@pytest.mark.parametrize("name", ["long " * 1000, "x" * 5000])
def test_a_long_name_is_cut_short_and_its_score_stays(name: str) -> None:
    page, labels, boxes = paper(), np.array([0]), np.array([[100.0, 80.0, 200.0, 120.0]])
    drawn, other = (draw(page, labels, boxes, [name], np.array([score])) for score in (0.11, 0.88))
    assert (drawn[:80] == colour(0)).all(-1).any(0).sum() > 270  # nearly as wide as the page
    assert (drawn != other).any()


@pytest.mark.parametrize("name", ["", "Überschrift", "表格", "عنوان", "🙂"])
def test_names_may_be_in_any_script(name: str) -> None:
    drawn = draw(paper(), np.array([0]), np.array([[100.0, 80.0, 200.0, 120.0]]), [name], np.array([0.5]))
    assert drawn.shape == (200, 300, 3)
    assert 8 < (drawn[:78] == colour(0)).all(-1).any(1).sum() < 16  # one line


@pytest.mark.parametrize(("name", "drawn_as"), [("Üé", "Ue"), ("two\n lines", "two lines")])
def test_accents_and_line_breaks_are_dropped(name: str, drawn_as: str) -> None:
    drawn, expected = (draw(paper(), np.array([0]), np.array([[9.0, 80, 90, 99]]), [n]) for n in (name, drawn_as))
    assert (drawn == expected).all()


def test_a_label_too_large_for_the_page_is_left_out() -> None:
    drawn, nameless = (draw(paper(8), np.array([0]), np.array([[50.0, 2, 90, 5]]), [name]) for name in ("text", ""))
    assert (drawn == nameless).all()


@pytest.mark.parametrize("legend", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (12, 30)])
def test_pages_of_any_size_can_be_drawn(size: tuple[int, int], legend: bool) -> None:
    boxes = np.array([[0.0, 0.0, 1.0, 1.0], [0.2, 0.2, 0.2, 0.2], [5.0, 7.0, 2.0, -3.0], [-9.0, -9.0, -5.0, -5.0]])
    drawn = draw(paper(*size), np.array([0, 1, 2, 1]), boxes, NAMES, np.ones(4), legend)
    assert drawn.shape[1] == size[1]
    assert drawn.shape[0] > size[0] if legend else drawn.shape[0] == size[0]
    assert (drawn[0, 0] != 255).any()


def test_corners_may_be_in_any_order() -> None:
    drawn, turned = (
        draw(paper(), np.array([0]), np.array([box]), NAMES) for box in ([20, 60, 90, 99], [90, 99, 20, 60])
    )
    assert (drawn == turned).all()


# Legend


def test_a_legend_names_each_class_once_and_the_labels_hold_only_scores() -> None:
    page, labels = paper(), np.array([2, 0, 2])
    boxes = np.array([[20.0, 60.0, 80.0, 90.0], [100.0, 60.0, 180.0, 90.0], [20.0, 120.0, 80.0, 150.0]])
    drawn = draw(page, labels, boxes, NAMES, legend=True)
    assert (drawn[:200] == draw(page, labels, boxes, [""] * 3)).all()
    squares = [(drawn[200:] == colour(label)).all(-1).sum() for label in range(3)]
    assert squares[0] == squares[2] > 50
    assert squares[1] == 0
    scored = draw(page, labels, boxes, NAMES, np.full(3, 0.5), legend=True)
    assert (scored[:200] == draw(page, labels, boxes, [""] * 3, np.full(3, 0.5))).all()
    assert (scored[200:] == drawn[200:]).all()


def test_a_legend_has_as_many_lines_as_its_names_need() -> None:
    labels, boxes = np.arange(3), np.array([[20.0, 60.0, 80.0, 90.0]] * 3)
    short, long = (
        draw(paper(), labels, boxes, [name] * 3, legend=True) for name in ("a", "a name as wide as the page")
    )
    assert len(long) - 200 == 3 * (len(short) - 200)


# Sheets


def test_pages_of_different_sizes_lie_side_by_side() -> None:
    drawn = grid([np.full((20, 30, 3), 10, np.uint8), np.full((40, 10, 3), 20, np.uint8)], columns=2)
    assert drawn.shape == (40 + 2 * 8, 2 * 30 + 3 * 8, 3)
    assert (drawn[8:28, 8:38] == 10).all()
    assert (drawn[8:48, 46:56] == 20).all()
