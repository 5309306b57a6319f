"""Scoring of tasks during a run (label likelihood, generation, perplexity), and metrics over the accuracy matrix."""
