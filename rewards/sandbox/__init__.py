"""Processes without rights in which a model's programs run."""
