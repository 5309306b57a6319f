"""GMT, gradient-mask tuning (arXiv 2406.15330)."""
