"""The trainer: configuration, the loop, the learner group."""
