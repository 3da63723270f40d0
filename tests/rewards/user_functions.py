"""Reward functions as people bring them: verl, TRL and open-r1, OpenRLHF, verifiers, slime;
classes, wrappers, odd results."""

import asyncio
import functools
import math
import os
import re
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np


# --- verl
def verl_plain(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.strip() == ground_truth)


def verl_kw(data_source, solution_str, ground_truth, extra_info=None, *, scale, bias=0.0):
    return scale * (ground_truth in solution_str) + bias


def verl_dict(data_source, solution_str, ground_truth, extra_info=None, **kw):
    ok = solution_str.strip() == ground_truth
    return {
        "score": 1.0 if ok else -1.0,
        "acc": ok,
        "pred": solution_str,
        "format": np.float32(0.5),
        "seen": [1, 2],
    }


def verl_shaped(data_source, solution_str, ground_truth):
    return {"score": 1.4, "acc": False}


def tinyzero(solution_str, ground_truth, method="strict", format_score=0.1, score=1.0):
    if "<|im_start|>assistant" in solution_str:
        solution_str = solution_str.split("<|im_start|>assistant", 1)[1]
    else:
        return 0
    eq = re.findall(r"<answer>(.*?)</answer>", solution_str)
    if not eq:
        return 0
    nums = sorted(int(n) for n in re.findall(r"\d+", eq[-1]))
    if nums != sorted(ground_truth["numbers"]):
        return format_score
    return score if abs(eval(eq[-1]) - ground_truth["target"]) < 1e-5 else format_score


def logic_rl(solution_str, ground_truth, method="strict"):
    return (
        2
        if ground_truth["solution_text_format"] in solution_str.split("<|im_start|>assistant", 1)[1]
        else -1.5
    )


def search_r1(solution_str, ground_truth, **kw):
    return float(any(t.lower() in solution_str.lower() for t in ground_truth["target"]))


def verl_batch(data_sources, solution_strs, ground_truths, extra_infos, threshold=1):
    return [
        {"score": float(a == b), "acc": a == b}
        for a, b in zip(solution_strs, ground_truths, strict=True)
    ]


def verl_dict_of_lists(data_sources, solution_strs, ground_truths, extra_infos):
    return {
        "score": [float(a == b) for a, b in zip(solution_strs, ground_truths, strict=True)],
        "length": [len(s) for s in solution_strs],
    }


def dispatch(data_source, solution_str, ground_truth, extra_info=None):
    if data_source.startswith("math"):
        return 1.0
    raise NotImplementedError(f"Reward function is not implemented for {data_source=}")


async def verl_async(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0.01)
    return ground_truth in solution_str


def verl_column(solution_str, ground_truth, difficulty):
    return float(difficulty)


# --- TRL
def trl_acc(completions, solution, **kwargs):
    return [
        1.0 if s in c[0]["content"] else 0.0 for c, s in zip(completions, solution, strict=True)
    ]


def trl_str(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def trl_len(completions, **kwargs):
    return [-abs(20 - len(c)) for c in completions]


def trl_none(completions, task, **kwargs):
    return [1.0 if t == "math" else None for t in task]


def trl_logs(prompts, completions, log_metric=None, log_extra=None, **kwargs):
    log_metric("my/acc", 0.25)
    log_extra("pred", [c[:3] for c in completions])
    log_extra("n", [len(c) for c in completions])
    return [0.5] * len(completions)


def trl_state(completions, trainer_state, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]


def trl_tensor(completions, **kwargs):
    import torch

    return torch.tensor([float(len(c)) for c in completions], dtype=torch.bfloat16)


def trl_column_tensor(completions, **kwargs):
    import torch

    return torch.ones(len(completions), 1)


def trl_generator(completions, **kwargs):
    return (float(len(c)) for c in completions)


def trl_numpy(completions, **kwargs):
    return [np.float32(1), np.int64(0)][: len(completions)]


def trl_ids(completion_ids, **kwargs):
    return [float(sum(ids)) for ids in completion_ids]


def trl_required(completions, difficulty):
    return [float(d) for d in difficulty]


def trl_scalar(completions, **kwargs):
    return 0.5


def trl_kwargs_gt(completions, **kwargs):
    return [float(g in c) for c, g in zip(completions, kwargs["ground_truth"], strict=True)]


def think_format(completions, **kwargs):
    return [
        (
            1.0
            if re.match(r"^<think>.*?</think>\s*<answer>.*?</answer>$", c[0]["content"], re.S)
            else 0.0
        )
        for c in completions
    ]


def tag_count(completions, **kwargs):
    return [
        sum(
            0.25
            for t in ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
            if c[0]["content"].count(t) == 1
        )
        for c in completions
    ]


def len_reward(completions, solution, **kw):
    ls = [len(c[0]["content"]) for c in completions]
    lo, hi = min(ls), max(ls)
    if lo == hi:
        return [0.0] * len(ls)
    return [0.5 - (n - lo) / (hi - lo) for n in ls]


def get_cosine(min_wrong=-1.0, max_wrong=-0.5, min_right=0.5, max_right=1.0, max_len=1000):
    def cosine_scaled_reward(completions, solution, **kwargs):
        out = []
        for c, s in zip(completions, solution, strict=True):
            right = s in c[0]["content"]
            lo, hi = (min_right, max_right) if right else (max_wrong, min_wrong)
            out.append(
                lo + 0.5 * (hi - lo) * (1 + math.cos(math.pi * len(c[0]["content"]) / max_len))
            )
        return out

    return cosine_scaled_reward


def code_reward(completions, verification_info, num_parallel=2, **kwargs):
    return [float(num_parallel) if v["test_cases"] else 0.0 for v in verification_info]


def mv_swallow(completions, solution, **kwargs):
    from math_verify import parse, verify

    out = []
    for c, s in zip(completions, solution, strict=True):
        try:
            out.append(float(verify(parse(s), parse(c))))
        except Exception:
            out.append(0.0)
    return out


def mv_raise(data_source, solution_str, ground_truth):
    from math_verify import parse, verify

    return float(verify(parse("$" + ground_truth + "$"), parse(solution_str)))


# --- OpenRLHF
def orlhf(queries, prompts, labels, **kwargs):
    import torch

    rows = zip(queries, prompts, labels, strict=True)
    r = torch.tensor(
        [1.5 if label in query[len(prompt) :] else -0.5 for query, prompt, label in rows]
    )
    return {
        "rewards": r,
        "scores": (r > 0).float(),
        "extra_logs": {"len": torch.tensor([float(len(q)) for q in queries]), "const": 3},
    }


def orlhf_list(queries, prompts, labels):
    return [1.0 for _ in queries]


# --- verifiers / prime-rl
def vf_acc(completion, answer, **kwargs):
    return 1.0 if answer in completion[-1]["content"] else 0.0


async def vf_state(state):
    return float(state["info"]["points"]) / 10


def vf_parser(parser, completion, answer):
    return float(parser.parse_answer(completion) == answer)


def vf_group(completions, states, answers):
    return [float(i) for i, _ in enumerate(completions)]


# --- slime
async def slime(args, sample, **kwargs):
    return {"score": float(sample.label in sample.response), "pred": sample.response}


# --- shapes of code
class Cls:
    def __init__(self, weight=1.0):
        self.weight = weight
        self.calls = 0

    def __call__(self, completions, **kw):
        self.calls += 1
        return [self.weight] * len(completions)


class NeedsArg:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, solution_str, ground_truth):
        return self.weight


class AsyncCls:
    async def __call__(self, data_source, solution_str, ground_truth, extra_info=None):
        return 0.75


instance = Cls(2.0)


class Holder:
    @staticmethod
    def score(solution_str, ground_truth):
        return 3.0


def lam(completions, **kw):
    return [0.1] * len(completions)


part = functools.partial(verl_kw, scale=5.0)


def timed(f):
    @functools.wraps(f)
    def inner(*a, **k):
        return f(*a, **k)

    return inner


def bare(f):
    def inner(*a, **k):
        return f(*a, **k)

    return inner


wrapped = timed(verl_plain)
unwrapped = bare(verl_plain)


def posonly(solution_str, ground_truth, /):
    return 0.25


cached = functools.lru_cache(maxsize=None)(lambda solution_str, ground_truth: 1.0)


# --- odd
def noisy(data_source, solution_str, ground_truth):
    print("noise")
    print("err", file=sys.stderr)
    os.write(1, b"raw\n")
    return 1


def raises(completions, **kw):
    d = {}
    return [d["answer"]]


def exits(solution_str, ground_truth):
    sys.exit(3)


def sleeps(solution_str, ground_truth):
    time.sleep(100)


def none(solution_str, ground_truth):
    pass


def tup(solution_str, ground_truth):
    return (1.0, {"x": 1})


def text(solution_str, ground_truth):
    return "1.0"


def nan(solution_str, ground_truth):
    return float("nan")


def dec(solution_str, ground_truth):
    return Decimal("0.5")


def frac(solution_str, ground_truth):
    return Fraction(1, 4)


def cplx(solution_str, ground_truth):
    return 1j


def npbool(solution_str, ground_truth):
    return np.bool_(True)


def torch0(solution_str, ground_truth):
    import torch

    return torch.tensor([[0.5]], requires_grad=True)


def nested(solution_str, ground_truth):
    return {"score": 1.0, "parts": {"a": 1}, "why": "because"}


def badrepr(solution_str, ground_truth):
    class X:
        def __repr__(self):
            raise RuntimeError

    return X()


def recursion(solution_str, ground_truth):
    return recursion(solution_str, ground_truth)


class Base(BaseException):
    pass


def base(solution_str, ground_truth):
    raise Base("limit")


def toomany(completions, **kw):
    return [1.0] * 7


def alpha(alpha, beta):
    return 1.0


def makes_float(x=1):
    return 2.0
