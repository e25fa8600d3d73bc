"""The network: pages in, boxes out."""
