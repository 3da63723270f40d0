"""Written for slime: `--custom-rm-path example_rewards.slime_style.reward`."""


async def reward(args, sample, **kwargs):
    if sample.status == "truncated":
        return 0.0
    return 1.0 if sample.label in sample.response else -0.5
