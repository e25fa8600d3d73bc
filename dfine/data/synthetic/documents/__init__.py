"""Drawn pages that look like real documents: typefaces, colours and layouts of many kinds."""
