"""Tests of cl_dist.models."""
