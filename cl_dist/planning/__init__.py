"""What a run will need, from its recipe and the model's shape alone: memory, communication, checkpoints."""
