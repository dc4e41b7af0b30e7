"""Ways to damage a file, and what may come of loading it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck
from hypothesis import strategies as st

from tokenstep.models import ModelFileError, UnsupportedConfig, load

REFUSALS = (ModelFileError, UnsupportedConfig)
LARGE = (2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

Edit = Callable[[bytearray], None]


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """One way to damage a file: a byte, a number, a piece taken out, doubled or cut off."""
    where = draw(st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["byte", "number", "remove", "double", "cut"]))
    byte, number, length = draw(st.integers(0, 255)), draw(st.sampled_from(LARGE)), draw(st.integers(1, 40))

    def edit(data: bytearray) -> None:
        at = int(where * len(data))
        if kind == "byte":
            data[at : at + 1] = bytes([byte])
        elif kind == "number":
            data[at : at + 8] = struct.pack("<Q", number)
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        else:
            del data[at:]

    return edit


def damaged(contents: bytes, changes: list[Edit], end: int) -> bytes:
    """The file with the changes made to its first `end` bytes, the header."""
    head = bytearray(contents[:end])
    for change in changes:
        if head:
            change(head)
    return bytes(head) + contents[end:]


def load_or_refuse(path: Path) -> None:
    """Loads the model; of all exceptions only a refusal that names its source is allowed."""
    try:
        load(path)
    except REFUSALS as error:
        message = str(error)
    else:
        return
    assert message.startswith("tokenstep.load: ")
