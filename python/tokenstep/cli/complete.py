"""``tokenstep complete``: text to stdout as it is generated, statistics to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from tokenstep.cli.options import add_cache_options, add_model_options, load_llm
from tokenstep.cli.pause import collection_paused
from tokenstep.cli.text import CommandError, as_utf8
from tokenstep.completions.chat_schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
)
from tokenstep.completions.errors import RequestError
from tokenstep.completions.schema import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionRequest,
    Usage,
)
from tokenstep.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tokenstep.completions.service import CompletionService

OWN_FIELDS = {
    "model",
    "prompt",
    "stream",
    "stream_options",
    "peft",
}  # those that have no option made from the schema
MAX_BATCH = 32
METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``tokenstep complete``: its own, and one for each field of the request."""
    parser.usage = "tokenstep complete [options] [prompt ...]"
    parser.add_argument("prompt", nargs="*", help="one prompt or more; - reads one from stdin")
    add_model_options(parser)
    add_cache_options(parser)
    parser.add_argument("--peft", metavar="PATH", help="a LoRA adapter in PEFT's format to use")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same seed gives the same text under any load, at some cost in speed",
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print as it is generated (default: yes for a single text without --json)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the response object; with --stream a chunk a line"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message to the model, written by its chat template; without --max-tokens the"
        " answer goes on to its end",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    group = parser.add_argument_group("fields of the request")
    for name, field in CompletionRequest.model_fields.items():
        if name not in OWN_FIELDS:
            flags = ["--" + name.replace("_", "-")] + (["-" + name] if len(name) == 1 else [])
            given = field.default not in (None, [], {}, False)
            default = f" (default: {'yes' if field.default is True else field.default})" if given else ""
            group.add_argument(
                *flags, dest=name, help=f"{field.description}{default}", **_option(field.annotation)
            )


def run(args: argparse.Namespace) -> int:
    """Completes the prompts; returns the exit code."""
    num_choices = max(1, len(args.prompt)) * max(args.n or 1, args.best_of or 1)
    stream = args.stream if args.stream is not None else num_choices == 1 and not args.json
    if stream and num_choices > 1 and not args.json:
        raise CommandError(f"--stream: {num_choices} texts would mix; --json keeps their pieces apart")
    prompts = [as_utf8(sys.stdin.read()) if prompt == "-" else prompt for prompt in args.prompt]
    try:
        # what is wrong with the request itself is said before the model loads
        request = _chat_request(args, prompts, stream) if args.chat else _request(args, prompts, stream)
        return _complete(request, args, min(num_choices, MAX_BATCH))
    except RequestError as error:
        raise CommandError(error.message) from None


def _request(args: argparse.Namespace, prompts: list[str], stream: bool) -> CompletionRequest:
    if args.system is not None:
        raise CommandError("--system: only with --chat")
    return CompletionRequest.parse(
        {**_fields(args, stream), "prompt": prompts if len(prompts) > 1 else "".join(prompts)}
    )


def _chat_request(args: argparse.Namespace, prompts: list[str], stream: bool) -> ChatRequest:
    if len(prompts) != 1:
        raise CommandError(f"--chat: expected one message, found {len(prompts)}")
    fields = _fields(args, stream)
    top = fields.pop("logprobs")
    for name in fields.keys() - ChatRequest.model_fields.keys():
        if fields.pop(name) is not None:
            raise CommandError(f"--{name.replace('_', '-')}: not with --chat")
    messages = [{"role": "user", "content": prompts[0]}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return ChatRequest.parse(
        {**fields, "messages": messages, "logprobs": top is not None, "top_logprobs": top}
    )


def _fields(args: argparse.Namespace, stream: bool) -> dict[str, Any]:
    """What the options say of the request, beside its prompt."""
    fields = {name: getattr(args, name, None) for name in CompletionRequest.model_fields.keys() - OWN_FIELDS}
    fields["peft"] = args.peft
    return {**fields, "stream": stream, "stream_options": {"include_usage": True} if stream else None}


def _complete(request: CompletionRequest | ChatRequest, args: argparse.Namespace, max_batch: int) -> int:
    let_idle_threads_sleep()
    begin = time.perf_counter()
    with collection_paused():
        from tokenstep.completions.chat import chat

        adapters = [] if args.peft is None else [(args.peft, args.peft)]
        loaded = load_llm(args, adapters, max_batch=max_batch)
    with loaded as llm:
        watch = Stopwatch(loading=time.perf_counter() - begin)
        if request.stream:
            usage = _stream(_chunks(llm.service, request), watch, as_json=args.json)
        else:
            answer: Completion | ChatCompletion
            if isinstance(request, ChatRequest):
                answer = chat(llm.service, request, watch.lap)
            else:
                answer = llm.service.complete(request, watch.lap)
            usage = answer.usage
            _print_whole(answer, as_json=args.json)
    print(watch.report(usage), file=sys.stderr)
    return 0


class Stopwatch:
    """Times one request from the moment this is made; `loading` is what came before, in seconds."""

    def __init__(self, loading: float) -> None:
        self._loading = loading
        self._begin = time.perf_counter()
        self._first: float | None = None
        self._last = self._begin

    def lap(self) -> None:
        """Something has been generated."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last

    def report(self, usage: Usage) -> str:
        """One line of statistics."""
        tokens, seconds = usage.completion_tokens, self._last - self._begin
        rate = f" in {seconds:.2f} s ({tokens / seconds:.1f} tok/s)" if tokens and seconds else ""
        first = (
            f", first after {self._first - self._begin:.3f} s" if tokens and self._first is not None else ""
        )
        prompt = f"; {usage.prompt_tokens} in the prompt"
        return f"{tokens} tokens{rate}{first}{prompt}; loaded in {self._loading:.2f} s"


def _chunks(
    service: CompletionService, request: CompletionRequest | ChatRequest
) -> Iterable[CompletionChunk] | Iterable[ChatCompletionChunk]:
    from tokenstep.completions.chat import stream_chat

    if isinstance(request, ChatRequest):
        return stream_chat(service, request)
    return service.stream(request)


def _stream(
    chunks: Iterable[CompletionChunk] | Iterable[ChatCompletionChunk], watch: Stopwatch, *, as_json: bool
) -> Usage:
    """Prints the chunks as they come; returns the usage of the last one."""
    usage = None
    written = ""
    for chunk in chunks:
        if chunk.choices:
            watch.lap()
        usage = chunk.usage or usage
        text = _json(chunk) + "\n" if as_json else "".join(_text(choice) for choice in chunk.choices)
        print(text, end="", flush=True)
        written = text or written
    if not written.endswith("\n"):
        print()
    assert usage is not None, "the last chunk has the usage"
    return usage


def _print_whole(completion: Completion | ChatCompletion, *, as_json: bool) -> None:
    if as_json:
        print(_json(completion, indent=2))
        return
    for choice in completion.choices:
        if len(completion.choices) > 1:
            print(f"[{choice.index}]")
        print(_text(choice))


def _text(choice: CompletionChoice | ChatChoice | ChatChunkChoice) -> str:
    if isinstance(choice, CompletionChoice):
        return choice.text
    return choice.message.content if isinstance(choice, ChatChoice) else choice.delta.content


def _json(response: BaseModel, indent: int | None = None) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or ""
    is_unicode = encoding.lower().startswith("utf")
    return json.dumps(response.model_dump(), indent=indent, ensure_ascii=not is_unicode)


def _option(annotation: Any) -> dict[str, Any]:
    """What argparse is to do for a field of this type."""
    kind = _plain(annotation)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is list:
        inner = _plain(get_args(kind)[0])
        return {"action": "append", "type": inner, "metavar": METAVARS[inner]}
    if get_origin(kind) is dict:
        return {"action": _AppendPair, "metavar": "ID=BIAS"}
    return {"type": kind, "metavar": METAVARS[kind]}


def _plain(annotation: Any) -> Any:
    """The type without its constraints and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


class _AppendPair(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        key, _, value = str(values).partition("=")
        try:
            pair = {key: float(value)}
        except ValueError:
            parser.error(f"argument {option}: expected ID=BIAS with a number, found {values!r}")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **pair})
