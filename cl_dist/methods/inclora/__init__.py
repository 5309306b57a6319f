"""IncLoRA: new LoRA adapters for every task."""
