"""One implementation in a process of its own: ``python worker.py MODULE OPTIONS``, JSON lines in and out.

MODULE is a file beside this one with a class `Peer`, OPTIONS a JSON object, which may say more to that class:

    model: a GGUF file or a folder.          threads: how many to compute on.
    dtype, device, weights: as `tokenstep.LLM` takes them.
    max_batch, max_length: the largest case to come.
    lengths: for each length of prompt, the most tokens of prompt and output.

The first line out comes once a token has been generated, and describes the implementation. Then each line in,
``{"do": "generate", "prompts": [[id, …], …], "output_tokens": N, "sampling": {…} or null}``, is answered by
``{"seconds": S}``; "do" names the method of the `Peer`. Other interpreters than tokenstep's run this too: it
imports nothing of tokenstep. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    """Load, say so, answer until stdin ends."""
    module, options = sys.argv[1], json.loads(sys.argv[2])
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for variable in ("OMP_NUM_THREADS", "TOKENSTEP_NUM_THREADS"):
            os.environ[variable] = str(options["threads"])
        peer: Any = importlib.import_module(module).Peer(options)
        peer.generate([options["first_prompt"]], 1, None)
        print(json.dumps(peer.describe()), file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            act = getattr(peer, asked["do"])
            seconds = act(asked["prompts"], asked["output_tokens"], asked["sampling"])
            print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
