"""Plain sequential fine-tuning: nothing is done about forgetting. The lower bound of every table."""

from __future__ import annotations

from cl_dist.methods.protocol import Method


class Sequential(Method):
    """SeqFT, and SeqLoRA with adapters."""
