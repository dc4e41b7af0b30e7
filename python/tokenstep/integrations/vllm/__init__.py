"""The fused sampler and the paged attention inside vLLM: its plugin ``tokenstep``, off until asked for.

vLLM calls :func:`register` in each of its processes, by the entry point in the group
``vllm.general_plugins``. What it then replaces is said by the environment:

    TOKENSTEP_VLLM=1                      the sampler
    TOKENSTEP_VLLM=attention              the attention; ``sampler,attention`` is both
    VLLM_PLUGINS=tokenstep                the sampler as well: vLLM's own variable names its plugins

With none of them nothing is replaced, and nothing of vLLM or torch is imported: to install tokenstep beside
vLLM changes no result. ``TOKENSTEP_VLLM=0`` switches off what VLLM_PLUGINS names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

__all__ = ["chosen_parts", "register"]

PARTS = ("sampler", "attention")


def chosen_parts(environ: Mapping[str, str]) -> frozenset[str]:
    """What the environment asks for, of "sampler" and "attention".

    Raises:
        ValueError: TOKENSTEP_VLLM names something else.
    """
    choice = environ.get("TOKENSTEP_VLLM", "").strip().lower()
    if not choice:
        plugins = environ.get("VLLM_PLUGINS", "")
        choice = "1" if "tokenstep" in (name.strip() for name in plugins.split(",")) else "0"
    if choice in ("0", "1"):
        return frozenset(PARTS[:1] if choice == "1" else ())
    parts = frozenset(part.strip() for part in choice.split(","))
    if not parts <= set(PARTS):
        raise ValueError(f"TOKENSTEP_VLLM = {choice!r}, expected 0, 1 or a list of {', '.join(PARTS)}")
    return parts


def register() -> None:
    """Replaces what the environment asks for; calling it again does nothing.

    A vLLM whose inside is another one is left as it is, with an error in the log.

    Raises:
        ValueError: TOKENSTEP_VLLM names something that there is not.
    """
    for part in sorted(chosen_parts(os.environ)):
        try:
            if part == "sampler":
                from tokenstep.integrations.vllm.sampler import install
            else:
                from tokenstep.integrations.vllm.attention import install
            install()
        except (ImportError, AttributeError) as reason:
            report_no_place(part, reason)


def report_no_place(part: str, reason: Exception) -> None:
    """Logs that a part stays out of a vLLM that is another inside."""
    logging.getLogger("vllm.tokenstep").error(
        "tokenstep: this vLLM has no place for its %s (%s); vLLM's own runs", part, reason
    )
