"""Reward functions of a user's own, in the style of verl, TRL, OpenRLHF, slime or verifiers."""
