"""Rewards: a completion in, a verdict out. Imports nothing of the rest of emberl."""
