"""D-FINE in plain PyTorch, for document layout detection.

detector = dfine.load("runs/quickstart/best.pt")
for result in detector(["page.png", "report.pdf"]):  # images, PDFs, folders of them
    print(result.labels, result.scores, result.boxes)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DFine", "Detector", "PageResult", "load"]

if TYPE_CHECKING:
    from dfine.inference.pages import Detector, PageResult, load
    from dfine.model.detector import DFine
else:

    def __getattr__(name: str) -> Any:
        """Imports what is asked for, and torch with it: the commands answer --help before they need it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("dfine.model.detector" if name == "DFine" else "dfine.inference.pages"), name)
