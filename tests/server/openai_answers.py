"""What the `openai` client gives, streamed or not, in one form."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

KEY = "a-key"
MODEL = "smollm2"
GERMANY = "The capital of Germany is"
GREEDY: dict[str, Any] = {"model": MODEL, "prompt": GERMANY, "temperature": 0, "max_tokens": 4}


@dataclass
class Choice:
    """One choice; of its log probabilities, the parallel lists."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, part: Any) -> None:
        """A choice of the client's, or a piece of one."""
        assert self.finish_reason is None, "nothing comes after the end"
        self.text += part.text
        self.finish_reason, self.stop_reason = part.finish_reason, part.stop_reason
        self.token_ids += getattr(part, "token_ids", None) or []
        self.prompt_token_ids = getattr(part, "prompt_token_ids", None) or self.prompt_token_ids
        if part.logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                getattr(self, name).extend(getattr(part.logprobs, name))


@dataclass
class Answer:
    """A whole answer: choices by index, and what came only once."""

    model: str
    choices: list[Choice]
    usage: Any
    prompt: Any
    frames: Sequence[Any]

    @property
    def texts(self) -> list[str]:
        return [choice.text for choice in self.choices]

    @property
    def text(self) -> str:
        (text,) = self.texts
        return text


class Asker:
    """Asks as a user of the client does: its own parameters by name, others in `extra_body`."""

    def __init__(self, client: Any, stream: bool) -> None:
        self.client = client
        self.stream = stream
        self._known = inspect.signature(client.completions.create).parameters

    def __call__(self, **fields: Any) -> Answer:
        """The answer to `GREEDY` with `fields`."""
        wanted = {**GREEDY, **fields}
        named = {name: value for name, value in wanted.items() if name in self._known}
        extra = {name: value for name, value in wanted.items() if name not in self._known}
        if self.stream:
            named = {"stream_options": {"include_usage": True}, **named, "stream": True}
        found = self.client.completions.create(**named, extra_body=extra)
        frames = list(found) if self.stream else [found]
        parts = [part for frame in frames for part in frame.choices]
        if not self.stream:
            assert [part.index for part in parts] == list(range(len(parts)))
        choices = [Choice() for _ in {part.index for part in parts}]
        for part in parts:
            choices[part.index].add(part)
        prompts = [frame.prompt for frame in frames if getattr(frame, "prompt", None) is not None]
        assert len(prompts) <= 1
        return Answer(frames[0].model, choices, frames[-1].usage, prompts[0] if prompts else None, frames)
