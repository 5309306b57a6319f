"""Trains the rows or columns that a file of the user's names."""
