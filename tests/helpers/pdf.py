"""PDFs written by hand, so that what is on them and where is known."""

from pathlib import Path

RED = "1 0 0 rg 20 30 40 10 re f"  # the rectangle [20, 30, 60, 40] in points


def write_pdf(
    path: Path, pages: list[tuple[str, str]], broken: int | None = None, trailer: str = "", catalog: str = ""
) -> None:
    """Writes a PDF.

    Args:
        pages: what the page's dictionary holds beside type, parent and content; and its content.
        broken: a page whose dictionary is a number instead.
        trailer, catalog: what these dictionaries hold more.
    """
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [f"<< /Type /Catalog /Pages 2 0 R {catalog} >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for i, (entries, content) in enumerate(pages):
        page = f"<< /Type /Page /Parent 2 0 R {entries} /Contents {4 + 2 * i} 0 R >>"
        objects += ["7" if i == broken else page, f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"]
    text, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(text))
        text += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(text)}\n%%EOF\n"
    path.write_bytes((text + end).encode("latin-1"))
