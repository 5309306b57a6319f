"""Tests of scoring and metrics."""
