"""Recipes that assemble text on disk, which a `configs/data/*.yaml` then names as a source."""
