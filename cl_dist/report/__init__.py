"""Tables and pictures of a run, made only from its run folder: no model is loaded or trained."""

FORMATS = ("png", "svg", "pdf")
"""Formats of a report's pictures."""
