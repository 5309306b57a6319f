"""Scoring of tasks during a run (generation, label likelihood, perplexity), and metrics over the accuracy matrix."""
