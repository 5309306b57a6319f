"""KIF: fusion of old and new weights by the importance of skill units (arXiv 2408.05200)."""
