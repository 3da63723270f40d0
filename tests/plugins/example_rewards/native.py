"""Written for emberl."""

from emberl.rewards import reward


@reward
def short_enough(row):
    return len(row.completion) <= row.columns.get("limit", 20)


@reward(batched=True)
async def best_of_batch(rows):
    longest = max(len(row.completion) for row in rows)
    return [len(row.completion) / longest for row in rows]
