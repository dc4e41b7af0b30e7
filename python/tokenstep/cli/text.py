"""Text from outside and errors for people, whatever the locale."""

from __future__ import annotations

import os


class CommandError(Exception):
    """The command line asks for something that can't be done; the message says what."""


def as_utf8(text: str) -> str:
    """What the command line or stdin meant: bytes that the locale couldn't read are taken for UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    return text
