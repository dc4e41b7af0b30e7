"""``tokenstep complete``: text to stdout as it is generated, statistics to stderr."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import types
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from tokenstep.cli.pause import collection_paused
from tokenstep.cli.text import CommandError, as_utf8
from tokenstep.completions.errors import RequestError
from tokenstep.completions.schema import UNSUPPORTED, Completion, CompletionRequest, Usage
from tokenstep.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tokenstep.completions.service import CompletionService

OWN_FIELDS = {"model", "prompt", "stream", "stream_options"}  # those that have no option made from the schema
MAX_BATCH = 32
METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``tokenstep complete``: its own, and one for each field of the request."""
    parser.usage = "tokenstep complete [options] [prompt ...]"
    parser.add_argument("prompt", nargs="*", help="one prompt or more; - reads one from stdin")
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, a .gguf file or a folder (default: smollm2)"
    )
    parser.add_argument(
        "--device", default="auto", type=device_name, help="auto, cpu or cuda (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="what is computed in (default: auto)",
    )
    parser.add_argument(
        "--weights",
        default="auto",
        choices=("auto", "dequantised"),
        help="auto: quantised ones stay so on a CPU; dequantised: all become dtype (default: auto)",
    )
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
    group = parser.add_argument_group("fields of the request")
    for name, field in CompletionRequest.model_fields.items():
        if name not in OWN_FIELDS and name not in UNSUPPORTED:
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
    fields = {name: getattr(args, name, None) for name in CompletionRequest.model_fields.keys() - OWN_FIELDS}
    fields |= {"prompt": prompts if len(prompts) > 1 else "".join(prompts), "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    try:
        # what is wrong with the request itself is said before the model loads
        return _complete(CompletionRequest.parse(fields), args, min(num_choices, MAX_BATCH))
    except RequestError as error:
        raise CommandError(error.message) from None


def _complete(request: CompletionRequest, args: argparse.Namespace, max_batch: int) -> int:
    let_idle_threads_sleep()
    begin = time.perf_counter()
    with collection_paused():
        from tokenstep.llm import LLM
        from tokenstep.models import ModelNotFound

        try:
            loaded = LLM(
                args.model,
                device=args.device,
                dtype=args.dtype,
                weights=args.weights,
                max_batch=max_batch,
                batch_invariant=args.batch_invariant,
            )
        except ModelNotFound as error:
            raise CommandError(str(error)) from None
    with loaded as llm:
        watch = Stopwatch(loading=time.perf_counter() - begin)
        if request.stream:
            usage = _stream(llm.service, request, watch, as_json=args.json)
        else:
            completion = llm.service.complete(request, on_piece=watch.lap)
            usage = completion.usage
            _print_whole(completion, as_json=args.json)
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


def _stream(
    service: CompletionService, request: CompletionRequest, watch: Stopwatch, *, as_json: bool
) -> Usage:
    """Prints the chunks as they come; returns the usage of the last one."""
    usage = None
    written = ""
    for chunk in service.stream(request):
        if chunk.choices:
            watch.lap()
        usage = chunk.usage or usage
        text = _json(chunk) + "\n" if as_json else "".join(choice.text for choice in chunk.choices)
        print(text, end="", flush=True)
        written = text or written
    if not written.endswith("\n"):
        print()
    assert usage is not None, "the last chunk has the usage"
    return usage


def _print_whole(completion: Completion, *, as_json: bool) -> None:
    if as_json:
        print(_json(completion, indent=2))
        return
    for choice in completion.choices:
        if len(completion.choices) > 1:
            print(f"[{choice.index}]")
        print(choice.text)


def _json(response: BaseModel, indent: int | None = None) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or ""
    is_unicode = encoding.lower().startswith("utf")
    return json.dumps(response.model_dump(), indent=indent, ensure_ascii=not is_unicode)


def device_name(text: str) -> str:
    """An option's device, by name alone: whether it is there is seen later."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from auto, cpu, cuda)")
    return text


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
