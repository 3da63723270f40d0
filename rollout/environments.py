"""Environments, which answer the model between its turns, and the loop over a group's turns.

    class Dice(Environment):
        def step(self, text: str) -> Step:      # what the model said
            return "you threw a 4", None, False     # observation, reward, done

An environment that ends after one step is the plain case, and the base class is just that. Every
sample of a group has an environment of its own.

The loop stands on the driver, beside the pool, and not in the worker: there a user's code would
share a process with the engine and its weights, and a lost worker would take the state of the game
along. Here it finds the files and packages that the rewards find, and a turn whose worker was lost
is sampled anew with the same draws, from where the turn before ended. What the engine sees is a
continuation as it knows them from parked requests: the sample's own tokens, then those of the
observation, never tokenised again. The price: a group's samples go through their turns together.

Environments are untrusted: `reset` and `step` run in threads with a deadline, and what they raise
ends their episode, which then has a status and no verdict."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from .samples import (
    Completion,
    Episode,
    EpisodeStatus,
    FinishReason,
    Prompt,
    Sampling,
    Span,
    merge_spans,
)

Step = tuple[str, float | None, bool]
"""(observation, reward, done): the environment's next message, the reward of the turn (None: none
yet), and whether the episode is over, in which case the observation is ignored."""

AT_ONCE = 16
"""Steps that run at the same time; as many that are late and still run are the end of stepping,
since no thread can be stopped."""


class Environment:
    """One episode. Any class with these methods will do; this one ends after the first turn, as
    without an environment."""

    role = "user"
    """Role of the observations in the chat template; `tool` if the template has it."""

    def reset(self, prompt: Prompt) -> None:
        """Called once, before the first `step`; the prompt has the row's `answer`, `messages` and
        `columns`."""

    def step(self, text: str) -> Step:
        """Answers the model's text of this turn, without its end token. Called for every turn, also
        for the last one and for one that reached the length limit."""
        return "", None, True


@dataclass(kw_only=True, slots=True, eq=False)
class Session:
    """The running episode of one sample."""

    environment: Any = None
    turns: list[int] = field(default_factory=list)
    messages: list[Mapping[str, str]] = field(default_factory=list)
    reward: float | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class GroupEpisodes:
    """The episodes of one group: samples that go on, samples that have ended, and the session of
    each."""

    going_on: tuple[Completion, ...] = ()
    """Samples that end with an observation, after which the engine continues."""
    ended: list[Completion] = field(default_factory=list)
    sessions: dict[int, Session] = field(default_factory=dict)


class Episodes:
    """The loop over turns of every group; to be used on one event loop."""

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        text: Callable[[Sequence[int], FinishReason], str],
        observe: Callable[[str, int], Sequence[int]],
        role: str = "user",
        prefix: str = "",
        max_turns: int,
        timeout: float,
    ) -> None:
        """make: an environment for one episode. text: of the tokens of a turn. observe: the tokens
        of an observation up to where the model's next turn begins, after a turn that ended with
        this token; ValueError if it cannot be tokenised. role: of the observations. prefix: how
        turns after the first begin, where an observation's tokens have that already. timeout:
        seconds for one `step`."""
        self._make = make
        self._text = text
        self._observe = observe
        self._role = role
        self._prefix = prefix
        self._max_turns = max_turns
        self._timeout = timeout
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._late: list[threading.Thread] = []

    async def advance(
        self,
        group: GroupEpisodes,
        prompt: Prompt,
        sampling: Sampling,
        completions: Sequence[Completion],
    ) -> None:
        """Shows a turn of the group's samples to their environments, and sorts them into `going_on`
        and `ended`."""
        before = {completion.sample: completion for completion in group.going_on}
        for completion in completions:
            session = group.sessions.setdefault(completion.sample, Session())
            session.turns.append(len(before[completion.sample]) if before else 0)
        known = [whole(c, before.get(c.sample)) for c in completions]
        steps = [self._step(group.sessions[c.sample], prompt, sampling, c) for c in known]
        after = await asyncio.gather(*steps)
        group.going_on = tuple(c for c in after if c.episode is None)
        group.ended += [c for c in after if c.episode is not None]

    async def _step(
        self, session: Session, prompt: Prompt, sampling: Sampling, completion: Completion
    ) -> Completion:
        """The completion with its episode, or, without one, with an observation to go on from."""
        turn = completion.token_ids[session.turns[-1] :].tolist()
        begun = self._prefix if session.messages else prompt.prefix
        text = begun + self._text(turn, completion.finish_reason)
        session.messages.append({"role": "assistant", "content": text})

        def play() -> Step:
            if session.environment is None:
                session.environment = self._make()
                session.environment.reset(prompt)
            return _checked(session.environment.step(text))

        try:
            observation, reward, done = await self._in_thread(play)
        except _StepError as error:
            return _ended(completion, session, error.status, str(error))
        if reward is not None:
            session.reward = (session.reward or 0.0) + reward
        if done:
            return _ended(completion, session, "done")
        if completion.finish_reason != "stop":
            return _ended(completion, session, "length")
        if len(session.turns) == self._max_turns:
            return _ended(completion, session, "max_turns")
        try:
            tokens = self._observe(observation, int(completion.token_ids[-1]))
        except ValueError as error:
            return _ended(completion, session, "bad_reply", str(error))
        if not tokens:
            return _ended(completion, session, "bad_reply", "an observation without any token")
        if len(completion) + len(tokens) >= sampling.max_tokens:
            return _ended(replace(completion, finish_reason="length"), session, "length")
        session.messages.append({"role": self._role, "content": observation})
        return _with_observation(completion, tokens)

    async def _in_thread(self, work: Callable[[], Step]) -> Step:
        """The result of `work`, run in a daemon thread. Raises `_StepError` if `work` raises, or
        takes longer than the deadline."""
        async with self._slots:
            self._late = [thread for thread in self._late if thread.is_alive()]
            if len(self._late) >= AT_ONCE:
                raise _StepError("timeout", f"{len(self._late)} earlier steps are stuck")
            loop = asyncio.get_running_loop()
            outcome: asyncio.Future[Step | _StepError] = loop.create_future()

            def settle(result: Step | _StepError) -> None:
                if not outcome.done():
                    outcome.set_result(result)

            def run() -> None:
                try:
                    result: Step | _StepError = work()
                except _StepError as error:
                    result = error
                except BaseException as error:  # untrusted, SystemExit included
                    result = _StepError("error", f"{type(error).__name__}: {error}")
                with suppress(RuntimeError):  # the run is over, and its loop closed
                    loop.call_soon_threadsafe(settle, result)

            # a daemon, so that a stuck one does not hold up the exit
            thread = threading.Thread(target=run, daemon=True, name="environment")
            thread.start()
            try:
                result = await asyncio.wait_for(outcome, self._timeout)
            except TimeoutError:
                self._late.append(thread)
                raise _StepError("timeout", f"no step within {self._timeout:g} s") from None
            if isinstance(result, _StepError):
                raise result
            return result


class _StepError(Exception):
    """A fault of the user's environment."""

    def __init__(self, status: Literal["error", "timeout", "bad_reply"], message: str) -> None:
        super().__init__(message[:1000])
        self.status = status


def _checked(reply: Any) -> Step:
    if not isinstance(reply, (tuple, list)) or len(reply) != 3:
        message = f"step must return (observation, reward, done), not {reply!r}"
        raise _StepError("bad_reply", message)
    observation, reward, done = reply
    try:
        worth = None if reward is None else float(reward)
    except Exception:  # of whatever type it is
        worth = math.nan
    if worth is not None and (isinstance(reward, str) or not math.isfinite(worth)):
        raise _StepError("bad_reply", f"a reward must be a finite number or None, not {reward!r}")
    if not isinstance(done, (bool, np.bool_)):
        raise _StepError("bad_reply", f"done must be true or false, not {done!r}")
    if not done and not isinstance(observation, str):
        raise _StepError("bad_reply", f"an observation must be a text, not {observation!r}")
    return observation, worth, bool(done)


def whole(completion: Completion, before: Completion | None) -> Completion:
    """An engine's continuation of `before`, with the loss mask, which engines do not know."""
    if before is None:
        return completion
    had = len(before)
    kept = np.array_equal(completion.token_ids[:had], before.token_ids)
    assert kept, "an engine changed the tokens of earlier turns"
    mask = np.concatenate([before.mask, np.ones(len(completion) - had, bool)])
    return replace(completion, loss_mask=mask, started=before.started)


def _with_observation(completion: Completion, tokens: Sequence[int]) -> Completion:
    """The completion followed by an observation's tokens. They belong to the version before them,
    since nobody sampled them, have log-prob 0 and do not train."""
    count, total = len(tokens), len(completion) + len(tokens)
    spans = [*completion.spans, Span(completion.spans[-1].version, len(completion), total)]
    return replace(
        completion,
        token_ids=np.concatenate([completion.token_ids, np.array(tokens, np.int32)]),
        logprobs=np.concatenate([completion.logprobs, np.zeros(count, np.float32)]),
        spans=merge_spans(spans),
        loss_mask=np.concatenate([completion.mask, np.zeros(count, bool)]),
        finish_reason="abort",
    )


def _ended(
    completion: Completion, session: Session, status: EpisodeStatus, message: str = ""
) -> Completion:
    episode = Episode(
        turns=tuple(session.turns),
        messages=tuple(session.messages),
        reward=session.reward,
        status=status,
        message=message,
    )
    return replace(completion, episode=episode)
