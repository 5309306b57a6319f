"""EWC, elastic weight consolidation (arXiv 1612.00796)."""
