"""Evaluation: what the commands `eval`, `chat` and `sample` and the evaluations of a run share."""
