"""Replay of past tasks' samples."""
