"""Per-task training, a bound."""
