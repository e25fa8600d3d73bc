"""Boxes drawn on pages."""

import numpy as np
from tiny import drawn_page

from dfine.inference.pictures import colour, draw, grid


def test_boxes_are_drawn_in_the_colour_of_their_class_and_the_page_stays_as_it_is() -> None:
    page = np.full((200, 150, 3), 255, np.uint8)
    boxes = np.array([[10.0, 20.0, 90.0, 80.0], [30.0, 100.0, 140.0, 190.0]])
    drawn = draw(page, np.array([0, 2]), boxes, ["text", "table", "figure"], np.array([0.9, 0.4]))
    assert (page == 255).all()
    assert drawn[80, 50].tolist() == list(colour(0))
    assert drawn[150, 30].tolist() == list(colour(2))
    assert (drawn[:18] == 255).all()


def test_a_page_without_boxes_is_drawn_as_it_is() -> None:
    page = drawn_page()
    assert (draw(page, np.zeros(0, np.int64), np.zeros((0, 4)), ["text"]) == page).all()


def test_the_classes_of_a_large_data_set_have_different_dark_colours() -> None:
    colours = [colour(label) for label in range(20)]
    assert len(set(colours)) == 20
    assert max(np.mean(c) for c in colours) < 128


def test_pages_of_different_sizes_lie_side_by_side() -> None:
    drawn = grid([np.full((20, 30, 3), 10, np.uint8), np.full((40, 10, 3), 20, np.uint8)], columns=2)
    assert drawn.shape == (40 + 2 * 8, 2 * 30 + 3 * 8, 3)
    assert (drawn[8:28, 8:38] == 10).all()
    assert (drawn[8:48, 46:56] == 20).all()
