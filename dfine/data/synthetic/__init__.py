"""Drawn pages with exact boxes."""
