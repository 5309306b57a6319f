"""MIGU, magnitude-based gradient updating (arXiv 2406.17245)."""
