"""Sparse memory fine-tuning: trains the embedding rows that a batch uses and other text does not."""
