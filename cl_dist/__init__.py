"""Distributed continual learning for language models: MIGU and KIF on DeepSpeed ZeRO shards."""

__version__ = "0.1.0"
