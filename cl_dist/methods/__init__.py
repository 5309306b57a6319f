"""Continual-learning methods, one short file each, and the protocol they share."""
