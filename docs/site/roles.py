"""The API reference shows docstrings' :func:`name` and :class:`name` as links."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces roles in each docstring; a name without a place in the reference stays code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is None:
            return

        def link(found: re.Match[str]) -> str:
            try:
                full = obj.resolve(found[1])
            except griffe.NameResolutionError:
                full = found[1]
            return f'<autoref identifier="{full}" optional><code>{found[1]}</code></autoref>'

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
