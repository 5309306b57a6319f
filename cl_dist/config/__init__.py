"""Recipes: read, overridden and checked here."""
