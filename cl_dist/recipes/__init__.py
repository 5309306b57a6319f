"""Recipes that come with the package: `cl-dist run NAME`."""
