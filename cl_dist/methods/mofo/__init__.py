"""MoFO, the momentum-filtered optimiser (arXiv 2407.20999)."""
