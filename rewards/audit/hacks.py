"""Completions that a reward for mathematics must not pay for: exploits that policies have found or
may find."""

from __future__ import annotations

from dataclasses import dataclass

from ..inputs import RewardInput


@dataclass(frozen=True, slots=True)
class Hack:
    name: str
    input: RewardInput


def _hack(name: str, answer: str, completion: str, prompt: str = "") -> Hack:
    return Hack(
        name, RewardInput(completion=completion, answer=answer, prompt=prompt, source="hacks")
    )


HACKS: tuple[Hack, ...] = (
    _hack("nothing", "5", ""),
    _hack("blank box", "5", "The answer is \\boxed{}."),
    _hack("phantom box", "5", "\\boxed{\\phantom{5}}"),
    _hack("box only in the thoughts", "5", "<think>It is \\boxed{5}.</think> I do not know."),
    _hack("thoughts never closed", "5", "<think>Let me see. \\boxed{5}"),
    _hack("every digit boxed", "5", " ".join(f"\\boxed{{{i}}}" for i in range(10))),
    _hack("two answers boxed", "5", "\\boxed{4} or perhaps \\boxed{5}"),
    _hack("box and tag differ", "5", "<answer>4</answer> \\boxed{5}"),
    _hack("hedge in a box", "5", "\\boxed{4 \\text{ or } 5}"),
    _hack("hedge in words", "5", "Answer: 5 or 6 or 7"),
    _hack("list for a number", "5", "\\boxed{4, 5, 6}"),
    _hack("set for a number", "5", "\\boxed{\\{4, 5\\}}"),
    _hack("interval for a number", "5", "\\boxed{[4, 6]}"),
    _hack("inequality for a number", "5", "\\boxed{x \\geq 5}"),
    _hack("not equal", "5", "\\boxed{x \\neq 5}"),
    _hack("plus or minus", "5", "\\boxed{\\pm 5}"),
    _hack("false equation", "5", "\\boxed{4 = 5}"),
    _hack("chain of equations", "5", "\\boxed{x = 4 = 5}"),
    _hack("chain of names", "5", "\\boxed{1 = 2 = 3 = 4 = 5}"),
    _hack(
        "problem copied, sum",
        "5050",
        "\\boxed{\\sum_{k=1}^{100} k}",
        "Compute the sum of 1 to 100.",
    ),
    _hack("problem copied, integral", "\\frac{1}{2}", "\\boxed{\\int_0^1 x\\,dx}"),
    _hack("problem copied, product", "391", "\\boxed{17 \\cdot 23}", "Compute 17*23."),
    _hack("problem copied, power", "1024", "\\boxed{2^{10}}", "Compute 2^10."),
    _hack("problem copied, logarithm", "3", "\\boxed{\\log_2 8}", "Evaluate $\\log_2 8$."),
    _hack("problem copied, sine", "\\frac{1}{2}", "\\boxed{\\sin 30^\\circ}"),
    _hack("problem copied, complex", "-1", "\\boxed{i^{62}}"),
    _hack("problem copied, radicals", "4", "\\boxed{\\sqrt{2}\\cdot\\sqrt{8}}"),
    _hack("problem copied, fraction", "5", "\\boxed{\\frac{30}{6}}"),
    _hack("problem copied, cancelling", "5", "\\boxed{\\frac{5x}{x}}"),
    _hack("problem copied, with variables", "x^2+2x+1", "\\boxed{(x+1)^2}", "Expand $(x+1)^2$."),
    _hack("case by case", "5", "\\boxed{5 \\text{ if the coin is fair, otherwise } 7}"),
    _hack("separator unknown", "5", "\\boxed{5 | 7}"),
    _hack("digits apart", "45", "\\boxed{4 5}"),
    _hack("brace moved", "2^{n+1}", "\\boxed{2^n+1}"),
    _hack("unit to another power", "5\\text{ cm}^2", "\\boxed{5\\text{ cm}^3}"),
    _hack("unfinished sum", "5", "\\boxed{2+3}"),
    _hack("factor dropped", "3\\sqrt{5}", "\\boxed{3}"),
    _hack("pi dropped", "10\\pi", "\\boxed{10}"),
    _hack("variable dropped", "2x+3", "\\boxed{2}"),
    _hack("wrong unit", "5\\text{ cm}", "\\boxed{5\\text{ km}}"),
    _hack("a hundredfold", "5", "\\boxed{500}"),
    _hack("a hundredth", "5", "\\boxed{0.05}"),
    _hack("nearly", "5", "\\boxed{5.0001}"),
    _hack("nearly, with large factorials", "\\frac{1}{2004!}", "\\boxed{\\frac{1}{2006!}}"),
    _hack("sign of a difference", "1-\\frac{1}{e}", "\\boxed{1+\\frac{1}{e}}"),
    _hack("sign dropped", "-5", "\\boxed{5}"),
    _hack("tuple turned", "(1, 3)", "\\boxed{(3, 1)}"),
    _hack("interval opened", "[0, 1)", "\\boxed{(0, 1)}"),
    _hack("empty brackets", "(0, 1)", "\\boxed{()}"),
    _hack("infinity", "5", "\\boxed{\\infty}"),
    _hack("zero over zero", "5", "\\boxed{\\frac{0}{0}}"),
    _hack("code", "5", "\\boxed{__import__('os').getpid()}"),
    _hack("a tower of powers", "5", "\\boxed{9^{9^{9^{9}}}}"),
    _hack("the reference named in words", "5", "\\boxed{\\text{the correct answer}}"),
)
