"""Prompt sources: data sets, files, generated problems."""
