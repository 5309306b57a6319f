"""Ranks: recognised if a launcher started them, otherwise started on this machine."""
