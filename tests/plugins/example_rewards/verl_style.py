"""Written for verl: `compute_score`, and the form for a batch."""

import re


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """1.0 for the right number after ####, 0.1 for a wrong number in the right form, as in verl's
    example for GSM8K."""
    found = re.findall(r"#### (-?[0-9.,]+)", solution_str)
    if not found:
        return 0.0
    correct = found[-1].replace(",", "") == ground_truth
    bonus = (extra_info or {}).get("bonus", 0.0)
    return {
        "score": (1.0 if correct else 0.1) + bonus,
        "acc": correct,
        "pred": found[-1],
        "source": data_source,
    }


async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(ground_truth in solution_str)


def compute_score_batch(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    return [
        1.0 if truth in text else -1.0
        for text, truth in zip(solution_strs, ground_truths, strict=True)
    ]
