"""Tests of cl_dist.tasks."""
