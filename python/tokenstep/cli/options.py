"""Types of options that several subcommands have."""

from __future__ import annotations

import argparse
import re


def device_name(text: str) -> str:
    """An option's device, by name alone: whether it is there is seen later."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from auto, cpu, cuda)")
    return text


def count(text: str) -> int:
    """A number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def named_path(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=PATH")
    return name, path
