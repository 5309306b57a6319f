"""Recipes that come with the package: YAML files, read by `cl_dist.config.load`."""
