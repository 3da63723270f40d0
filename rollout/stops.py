"""Stop strings: where an answer ends, found in the bytes of its tokens, so that every engine ends
it at the same token.

A string may begin in the middle of a token, go over several, and hold characters whose bytes are in
different tokens. Only what was sampled counts: a string in the prompt, or one that begins there,
ends nothing. Text of special tokens counts as it is written, so `<|im_end|>` may be a stop string
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class StopMatcher:
    """Finds the first of some strings in an answer that comes token by token.

    What it remembers of an answer is a `tail`: the bytes at its end that begin a stop string, b""
    at first.
    """

    def __init__(self, stop: Sequence[str], token_bytes: Sequence[bytes]) -> None:
        assert all(stop), "an empty stop string"
        self._stop = tuple(string.encode() for string in stop)
        self._token_bytes = token_bytes
        self._longest = max(map(len, self._stop))
        self._known: dict[tuple[bytes, int], bytes | None] = {}

    def step(self, tail: bytes, token: int) -> bytes | None:
        """The tail after one more token; None where the token completes a stop string."""
        key = (tail, token)
        if key not in self._known:
            piece = self._token_bytes[token] if token < len(self._token_bytes) else b""
            self._known[key] = self._tail(tail + piece)
        return self._known[key]

    def tail(self, tokens: Sequence[int]) -> bytes:
        """The tail of a turn in which no stop string is complete."""
        tail = b""
        for token in tokens:
            after = self.step(tail, token)
            assert after is not None, "a stop string ended the turn before"
            tail = after
        return tail

    def _tail(self, text: bytes) -> bytes | None:
        if any(string in text for string in self._stop):
            return None
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(string.startswith(text[start:]) for string in self._stop):
                return text[start:]
        return b""


class StopStrings:
    """Matchers for the answers of one model; its tokenizer is read with the first of them."""

    def __init__(self, model: str | Path | None) -> None:
        """model: a Hugging Face directory or a Hub id; None: there is no tokenizer."""
        self._model = model
        self._token_bytes: list[bytes] | None = None
        self._matchers: dict[tuple[str, ...], StopMatcher] = {}

    def matcher(self, stop: tuple[str, ...]) -> StopMatcher | None:
        """The matcher of these strings; None for no strings. Raises ValueError if the model has no
        tokenizer, or one whose tokens add no fixed bytes."""
        if not stop:
            return None
        if stop not in self._matchers:
            if self._model is None:
                raise ValueError(
                    "stop strings need a model with a tokenizer; leave rollout.stop out"
                )
            if self._token_bytes is None:
                from transformers import AutoTokenizer

                self._token_bytes = token_bytes(AutoTokenizer.from_pretrained(self._model))
            self._matchers[stop] = StopMatcher(stop, self._token_bytes)
        return self._matchers[stop]


def cut(text: str, stop: Sequence[str], *, keep: bool) -> str:
    """The text up to the stop string that begins first, of several that begin there the shortest;
    `keep`: with it."""
    matches = [(at, len(string)) for string in stop if (at := text.find(string)) >= 0]
    if not matches:
        return text
    at, length = min(matches)
    return text[: at + length if keep else at]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each token adds to a text, indexed by token id. Raises ValueError for a
    tokenizer whose tokens add no fixed bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = {id: piece for piece, id in tokenizer.get_vocab().items()}
    added = {int(id): str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    byte_level = backend is not None and "ByteLevel" in str(backend.decoder.__getstate__())
    read = _byte_level if byte_level else _sentence_piece
    table = [b""] * (max([*pieces, *added]) + 1)
    for id, piece in pieces.items():
        table[id] = added[id].encode() if id in added else read(piece)
    for id in sorted(pieces)[:: max(1, len(pieces) // 256)]:
        _check(tokenizer, id, table[id])
    return table


def _check(tokenizer: Any, id: int, piece: bytes) -> None:
    """Raises ValueError unless the tokenizer decodes the token to these bytes. A leading space may
    differ: tokenizers may drop it."""
    try:
        expected = piece.decode()
    except UnicodeDecodeError:  # a part of a character, of which a tokenizer shows nothing
        return
    said = tokenizer.decode([id], clean_up_tokenization_spaces=False)
    if said.lstrip(" ") != expected.lstrip(" "):
        raise ValueError(
            f"rollout.stop: the tokenizer of the model reads token {id} as {said!r}, not as"
            f" {expected!r} as its vocabulary has it, so stop strings cannot be found in its"
            " tokens; leave rollout.stop out"
        )


def _byte_level(piece: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet, which has a printable character for each byte."""
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode()


def _sentence_piece(piece: str) -> bytes:
    """The bytes of a SentencePiece token, with U+2581 for a space and e.g. `<0x0A>` for a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _alphabet()
