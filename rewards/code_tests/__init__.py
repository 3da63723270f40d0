"""Programs in a completion, judged by running tests."""
