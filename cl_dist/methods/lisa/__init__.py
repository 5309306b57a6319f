"""LISA: random transformer blocks are trained for some steps at a time (arXiv 2403.17919)."""
