"""The driver's side of the weights: publish a version, prove that it is served, keep its
history."""
