"""Reward functions for several trainers."""
