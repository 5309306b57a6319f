"""The language model: built or loaded (sharded where ZeRO-3 asks), its adapters, its tracked layers, its export."""
