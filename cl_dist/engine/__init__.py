"""The DeepSpeed engine and the training step with its named moments."""
