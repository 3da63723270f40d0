"""Written for verifiers: functions of a `Rubric`, with the arguments that they name."""


def exact_match(parser, completion, answer):
    return 1.0 if parser.parse_answer(completion).strip() == answer else 0.0


async def by_info(completion, info, **kwargs):
    return info["points"] / 10
