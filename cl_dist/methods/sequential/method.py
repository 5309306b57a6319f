"""Plain sequential fine-tuning, which does nothing about forgetting: the lower bound of every table."""

from __future__ import annotations

from cl_dist.methods.protocol import Method


class Sequential(Method):
    """SeqFT, and SeqLoRA with adapters."""
