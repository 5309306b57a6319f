"""Tests; the tree mirrors cl_dist."""
