"""The styles of the drawn pages by name."""

from collections.abc import Callable

from dfine.data.synthetic import pages
from dfine.data.synthetic.documents import pages as documents

# Name: `page_size` and `draw_page`, both functions of (seed, index). Plain pages are quick to learn, documents teach
# the layout of real ones.
STYLES: dict[str, tuple[Callable[[int, int], tuple[int, int]], pages.Draw]] = {
    "plain": (pages.page_size, pages.draw_page),
    "documents": (documents.page_size, documents.draw_page),
}
