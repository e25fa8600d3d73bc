"""Measurements, for whoever changes the code: python -m dfine.tools.NAME."""
