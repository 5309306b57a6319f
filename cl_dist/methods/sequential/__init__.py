"""Plain sequential fine-tuning, the lower bound."""
