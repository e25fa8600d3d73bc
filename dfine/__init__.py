"""D-FINE (arXiv 2410.13842) in plain PyTorch, for document layout detection."""
