"""`emberl chat` and `emberl sample`: one model in this process, without Ray, for a person or a
pipe."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, TextIO

from rich.console import Console

from ...kernels import platform
from ...rollout.embedded.engine import EmbeddedEngine
from ...rollout.engine import WorkerSpec, check_engine, make_engine
from ...rollout.environments import whole
from ...rollout.samples import Completion, Prompt, Sampling
from ..answers import AnswerReader
from ..config.load import Config, ConfigError, user_errors
from ..config.sampling import EvalSetConfig
from ..data.templates import PromptWriter
from ..eval_sets import sampling_of
from ..model_files import check_model, load_tokenizer, prepare_model, stop_tokens
from .settings import configure, find_model
from .thinking import Thoughts, in_mode, split

Heard = Callable[[Sequence[int]], None]
"""A callback that gets all tokens of an answer so far."""
Message = dict[str, str]
SET = "prompt"
"""The name under which a conversation's settings stand in `eval.sets`."""

VISIBLE = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}
"""Code point of a control character -> of a picture of it: a model's answer must not be able to
control the terminal."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """An answer as a person reads it."""

    thoughts: str
    text: str
    """The answer after the thoughts."""


class Talker:
    """A model that answers conversations."""

    def __init__(self, model: str, overrides: Sequence[str], tell: Callable[[str], None]) -> None:
        """Checks the arguments and loads the model. Raises ConfigError for any mistake that shows
        before it is loaded."""
        named = find_model(model)
        config = configure(named, [f"{SET}=arithmetic"], overrides)
        settings = config.eval.sets[SET].beside(config.data)
        if len(settings.thinking.budgets) > 1:
            raise ConfigError(
                f"thinking.budgets={list(settings.thinking.budgets)}: an answer has one budget"
            )
        check_model(config)
        with user_errors():
            check_engine(config.rollout.engine, config.rollout.engine_args)
        self._made = TemporaryDirectory(prefix="emberl-")  # for a GGUF file's converted weights
        path = prepare_model(config, Path(self._made.name), tell)
        tokenizer = load_tokenizer(path, settings)
        with user_errors():
            self.settings: EvalSetConfig = in_mode(
                settings, settings.thinking, tokenizer.chat_template
            )
            self._writer = PromptWriter(self.settings, tokenizer)
            self._thoughts = _thoughts(self.settings, tokenizer)
        stops = stop_tokens(tokenizer, path)
        self._reader = AnswerReader(
            tokenizer=tokenizer, rollout=config.rollout, stop_token_ids=stops
        )
        longest = self.settings.max_response_length or config.rollout.max_response_length
        own = {"max_tokens": longest} | sampling_of(config, self.settings)
        self.sampling = Sampling(stop_token_ids=stops, stop=config.rollout.stop, **own)
        self.n = self.settings.samples or config.eval.samples
        self.stop = threading.Event()
        """Once set, by another thread or a signal, the current answers end; only the embedded
        engine checks it."""
        self._loop = asyncio.new_event_loop()
        self._engine: Any = self._loop.run_until_complete(_started(config, path, longest, self.n))

    def prompt(self, messages: Sequence[Message], number: int = 0) -> Prompt:
        """The prompt of a conversation. Raises ValueError if it is too long, or if the template
        refuses it."""
        made = self._writer.conversation(
            messages, id=f"{SET}/{number}", answer="", source=SET, columns={}
        )
        if not self._writer.fits(made):
            raise ValueError(
                f"{len(made.token_ids)} tokens are more than max_prompt_length="
                f"{self.settings.max_prompt_length}; begin anew, or set it higher"
            )
        return made

    def answers(
        self, prompts: Sequence[Prompt], n: int, heard: Heard | None = None
    ) -> list[list[Completion]]:
        """n answers to each prompt, in order; unfinished ones once `stop` is set. heard: follows a
        single answer, if the engine streams."""
        budget = next(iter(self.settings.thinking.budgets), None)
        limit = self.sampling.max_tokens if budget is None else budget
        first = replace(self.sampling, max_tokens=limit)
        answered = self._decode([(prompt, n, first) for prompt in prompts], {}, heard)
        if budget is not None:
            assert self._thoughts is not None
            partials: dict[str, list[Completion]] = {}
            for prompt in prompts:
                for c in [c for c in answered[prompt.id] if c.finish_reason == "length"]:
                    cut = self._thoughts.cut(prompt, c, budget)
                    partials.setdefault(prompt.id, []).append(c if cut is None else cut)
                    answered[prompt.id].remove(c)
            requests = [
                (p, len(partials[p.id]), self.sampling) for p in prompts if p.id in partials
            ]
            for name, more in self._decode(requests, partials, heard).items():
                before = {c.sample: c for c in partials[name]}
                answered[name] += [whole(c, before[c.sample]) for c in more]
        return [sorted(answered[prompt.id], key=lambda c: c.sample) for prompt in prompts]

    def _decode(
        self,
        requests: Sequence[tuple[Prompt, int, Sampling]],
        partials: dict[str, list[Completion]],
        heard: Heard | None,
    ) -> dict[str, list[Completion]]:
        answered: dict[str, list[Completion]] = {prompt.id: [] for prompt, _, _ in requests}
        if isinstance(self._engine, EmbeddedEngine):
            for prompt, n, sampling in requests:
                self._engine.submit(prompt, n, sampling, partials.get(prompt.id, ()))
            left = sum(n for _, n, _ in requests)
            while left:
                stopped = self.stop.is_set()
                for completion in self._engine.stop() if stopped else self._engine.step():
                    answered[completion.prompt_id].append(completion)
                    left -= 1
                if heard is not None and (running := self._engine.so_far()):
                    heard(running[0].token_ids.tolist())
            return answered

        async def collect() -> None:
            async for completion in self._engine.generate_all(requests, partials):
                answered[completion.prompt_id].append(completion)

        if requests:
            self._loop.run_until_complete(collect())
        return answered

    def read(self, prompt: Prompt, token_ids: Sequence[int], reason: Any = "abort") -> Part:
        """The text of an answer or of its beginning, its thoughts apart."""
        text = prompt.prefix + self._reader.said(token_ids, reason)
        opening = self.settings.thinking.open.strip()
        before = self._reader.tokenizer.decode(list(prompt.token_ids[-len(opening) - 1 :]))
        opened = bool(opening) and not prompt.prefix and before.rstrip().endswith(opening)
        thoughts, answer = split(text, self.settings.thinking, opened=opened)
        return Part(thoughts=thoughts, text=answer)

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())
        self._loop.close()
        self._made.cleanup()


def _thoughts(settings: EvalSetConfig, tokenizer: Any) -> Thoughts | None:
    return Thoughts(settings.thinking, tokenizer) if settings.thinking.budgets else None


async def _started(config: Config, path: str, longest: int, n: int) -> Any:
    """The engine, on the event loop that it will be used on."""
    target = platform.named(config.cluster.device)
    threads = platform.local_cpus() if target.is_cpu else 1
    platform.set_threads(threads)
    spec = WorkerSpec(
        model_path=path,
        device=target.device,
        dtype=config.model.dtype,
        threads=threads,
        max_num_seqs=min(config.rollout.max_num_seqs, max(n, 16)),
        max_model_len=config.eval.sets[SET].beside(config.data).max_prompt_length + longest,
        run_id="",
        timeout=config.sync.timeout,
        engine=config.rollout.engine,
        engine_args=config.rollout.engine_args,
    )
    return make_engine(spec, ())


def sample_command(
    model: str, prompts: Sequence[str], overrides: Sequence[str], console: Console, out: TextIO
) -> None:
    """Prints answers: as text if `out` is a terminal, else as a line of JSON each."""
    lenient(sys.stdin, out)
    asked = [text for given in prompts for text in (_lines(sys.stdin) if given == "-" else [given])]
    if not asked:
        raise ConfigError("nothing to answer; give --prompt TEXT, or --prompt - and lines on stdin")
    talker = Talker(model, overrides, lambda line: console.print(line, markup=False))
    try:
        with user_errors():
            made = [
                talker.prompt([{"role": "user", "content": text}], number)
                for number, text in enumerate(asked)
            ]
        for text, prompt, group in zip(asked, made, talker.answers(made, talker.n), strict=True):
            for completion in group:
                _show_sample(talker, text, prompt, completion, out)
    finally:
        talker.close()


def _show_sample(
    talker: Talker, text: str, prompt: Prompt, completion: Completion, out: TextIO
) -> None:
    part = talker.read(prompt, completion.token_ids.tolist(), completion.finish_reason)
    if out.isatty():
        screen = Console(file=out)
        screen.rule(f"{completion.sample + 1}: {completion.num_sampled} tokens")
        if part.thoughts:
            thoughts = part.thoughts.translate(VISIBLE)
            screen.print(thoughts, style="dim italic", markup=False, highlight=False)
        screen.print(part.text.translate(VISIBLE), markup=False, highlight=False)
        return
    logprob = round(float(completion.logprobs.sum()), 4)
    row = {
        "prompt": text,
        "sample": completion.sample,
        "thoughts": part.thoughts,
        "answer": part.text,
        "tokens": completion.num_sampled,
        "forced_tokens": len(completion) - completion.num_sampled,
        "finish_reason": completion.finish_reason,
        "logprob": logprob if math.isfinite(logprob) else None,  # JSON has no NaN
    }
    print(json.dumps(row, ensure_ascii=False), file=out, flush=True)


def chat_command(model: str, overrides: Sequence[str], console: Console) -> None:
    """Holds a conversation on the terminal. From a pipe each line is a turn, answers go to stdout
    and thoughts to stderr."""
    person = sys.stdin.isatty()
    lenient(sys.stdin, sys.stdout, sys.stderr)
    talker = Talker(model, overrides, lambda line: console.print(line, markup=False))
    if person:
        console.print(
            "/new begins anew, Ctrl-C ends an answer, /quit or Ctrl-D the conversation", style="dim"
        )
    messages: list[Message] = []
    try:
        for line in _turns(person):
            if line == "/new":
                messages = []
                continue
            messages.append({"role": "user", "content": line})
            try:
                prompt = talker.prompt(messages)
            except ValueError as error:
                messages.pop()
                if not person:
                    raise ConfigError(str(error)) from error
                console.print(f"{error} (/new)", style="red", markup=False)
                continue
            with ctrl_c_stops(talker) if person else nullcontext():
                answer = _answer(talker, prompt)
            messages.append({"role": "assistant", "content": answer.text})
    finally:
        talker.close()


def lenient(*streams: Any) -> None:
    """Makes streams replace bytes that they cannot decode and characters that they cannot
    encode."""
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def ctrl_c_stops(talker: Talker) -> Iterator[None]:
    """Within it, the first Ctrl-C ends the answer, and the second raises KeyboardInterrupt."""

    def ask(number: int, frame: FrameType | None) -> None:
        if talker.stop.is_set():
            raise KeyboardInterrupt
        talker.stop.set()

    talker.stop.clear()
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        talker.stop.clear()


def _answer(talker: Talker, prompt: Prompt) -> Part:
    voice = _Voice(talker.settings.thinking.close)
    [[completion]] = talker.answers(
        [prompt], 1, lambda tokens: voice.hear(talker.read(prompt, tokens))
    )
    part = talker.read(prompt, completion.token_ids.tolist(), completion.finish_reason)
    voice.hear(part, done=True)
    return part


class _Voice:
    """Prints an answer as it comes, its thoughts dim on stderr. Holds back text that may still
    change: a character whose bytes are not complete, and the beginning of a closing tag."""

    def __init__(self, close: str) -> None:
        self._close = close
        self._said = {"thoughts": "", "text": ""}
        self._thoughts = Console(stderr=True, soft_wrap=True)
        self._answer = Console(soft_wrap=True)

    def hear(self, part: Part, *, done: bool = False) -> None:
        thoughts, text = part.thoughts, part.text
        if not done:
            text = text.rstrip("\ufffd")
            if not text:
                thoughts = thoughts[: max(0, len(thoughts) - len(self._close))].rstrip("\ufffd")
        for name, now, console, style in (
            ("thoughts", thoughts, self._thoughts, "dim italic"),
            ("text", text, self._answer, None),
        ):
            before = self._said[name]
            if now.startswith(before) and now != before:
                if name == "text" and not before and self._said["thoughts"]:
                    self._thoughts.print()
                new = now[len(before) :]
                if console.is_terminal:
                    seen = new.translate(VISIBLE)
                    console.print(seen, end="", style=style, markup=False, highlight=False)
                else:  # as it is: rich would leave out characters
                    console.file.write(new)
                console.file.flush()
                self._said[name] = now
        if done:
            self._answer.print()


def _turns(person: bool) -> Iterator[str]:
    if not person:
        yield from _lines(sys.stdin)
        return
    import readline  # noqa: F401  (editing and history of input())

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


def _lines(stream: TextIO) -> Iterator[str]:
    return (line.strip() for line in stream if line.strip())
