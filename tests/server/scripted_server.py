"""A server over the scripted model, as a process of its own."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "completions"))

import torch
from scripted_model import ScriptedModel, make_service, recite

from tokenstep.cli.serve import LOG_FORMAT
from tokenstep.completions.service import CompletionService
from tokenstep.models.chat_template import ChatTemplate
from tokenstep.server.config import ServerConfig
from tokenstep.server.lifecycle import serve

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}>"


def slow_down(model: ScriptedModel, seconds: float) -> None:
    forward = model.forward

    def slow_forward(*arguments: Any) -> torch.Tensor:
        time.sleep(seconds)
        return forward(*arguments)

    model.forward = slow_forward  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--load-seconds", type=float, default=0)
    parser.add_argument("--step-seconds", type=float, default=0)
    parser.add_argument("--drain-seconds", type=float, default=30)
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format=LOG_FORMAT, level="INFO")

    def load() -> CompletionService:
        time.sleep(args.load_seconds)
        model = recite("a text that takes its time")
        slow_down(model, args.step_seconds)
        service = make_service(model, kv_tokens=4096)
        service.limits.tokenizer.chat_template = ChatTemplate(TEMPLATE, {})
        return service

    return serve(ServerConfig(port=args.port, drain_seconds=args.drain_seconds), load)


if __name__ == "__main__":
    sys.exit(main())
