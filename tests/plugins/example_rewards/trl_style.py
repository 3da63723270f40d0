"""Written for TRL: `reward_funcs=[accuracy_reward, length_reward]`."""


def accuracy_reward(completions, solution, **kwargs):
    """1.0 where the last message holds the solution; None (not applicable) where the row has
    none."""
    texts = [completion[0]["content"] for completion in completions]
    return [None if s == "" else float(s in text) for text, s in zip(texts, solution, strict=True)]


async def length_reward(prompts, completions, completion_ids, **kwargs):
    return [-len(ids) / 10 for ids in completion_ids]


def difficulty_reward(completions, difficulty, **kwargs):
    """Uses another column of the dataset."""
    return [float(d) for d in difficulty]
