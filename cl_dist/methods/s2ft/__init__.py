"""Structured sparse fine-tuning: trains the same channels and heads in all matrices that they couple."""
