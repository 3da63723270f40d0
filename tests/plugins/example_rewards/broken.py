"""What goes wrong in practice, one function for each."""

import os
import sys
import time


def raises(data_source, solution_str, ground_truth):
    raise KeyError("answer_key")


def raises_on_bad(data_source, solution_str, ground_truth):
    return 1.0 / (solution_str != "bad")


def hangs_on_bad(data_source, solution_str, ground_truth):
    while solution_str == "bad":
        time.sleep(0.01)
    return 1.0


def dies_on_bad(data_source, solution_str, ground_truth):
    if solution_str == "bad":
        os.abort()
    return 1.0


def returns_nan(data_source, solution_str, ground_truth):
    return float("nan")


def returns_none(data_source, solution_str, ground_truth):
    return None


def returns_text(data_source, solution_str, ground_truth):
    return "1.0"


def wrong_count(completions, **kwargs):
    return [1.0]


def odd_signature(alpha, beta):
    return 1.0


def prints(data_source, solution_str, ground_truth):
    print("noise on the standard output", flush=True)
    sys.stdout.write("more\n")
    return 1.0
