"""Multi-task training, a bound."""
