"""D-FINE in plain PyTorch, for document layout detection.

detector = dfine.load("runs/quickstart/best.pt")
for found in detector(["page.png", "report.pdf"]):  # images, PDFs, folders of them
    print(found.labels, found.scores, found.boxes)
"""

from dfine.inference.pages import Detector, Found, load
from dfine.model.detector import DFine

__all__ = ["DFine", "Detector", "Found", "load"]
