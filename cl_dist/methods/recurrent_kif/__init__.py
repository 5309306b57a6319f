"""Recurrent-KIF, KIF's successor (arXiv 2502.17510)."""
