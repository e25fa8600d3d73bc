"""The model computes the original implementation's numbers, part by part; see conftest.py and recorded.py."""
