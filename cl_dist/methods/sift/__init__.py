"""SIFT, sparse increment fine-tuning (arXiv 2312.11875)."""
