"""O-LoRA: IncLoRA with orthogonal adapters (arXiv 2310.14152)."""
