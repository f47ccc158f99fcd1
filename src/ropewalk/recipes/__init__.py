"""Recipes and the corpus that come with the package: data, read by path."""
