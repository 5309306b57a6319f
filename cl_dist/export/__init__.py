"""Models on their way out: a plain Hugging Face folder with a model card, and its upload to the Hub."""
