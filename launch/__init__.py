"""Ranks: found where a launcher made them, started on this machine where none did."""
