"""LwF, learning without forgetting (arXiv 1606.09282)."""
