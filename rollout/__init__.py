"""Rollouts: prompts in, completions out, on an engine whose weights carry a version number."""
