"""Sweeps: the grid of methods, orders and seeds that `cl-dist compare` runs. Imports no torch."""
