"""How peft names the parameters of adapters."""

from __future__ import annotations

LORA_A, LORA_B = ".lora_A.", ".lora_B."
"""Parts of a parameter's name, between the module that is adapted and the adapter's name."""
