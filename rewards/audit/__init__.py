"""Audits of rewards: known hacks, attacks on the sandbox, agreement with recorded verdicts."""
