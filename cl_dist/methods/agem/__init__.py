"""A-GEM, averaged gradient episodic memory (arXiv 1812.00420)."""
