"""Runs a DecoderModel as the engine does: pages in no order, several sequences at once, in any pieces."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from tokenstep.models import DecoderModel, ForwardBatch, KVCache

BLOCK_SIZE = 4


class Decoder:
    """Sequences that grow together.

    Args:
        model: the model.
        count: the number of sequences.
        max_tokens: what the longest may grow to.
    """

    def __init__(self, model: DecoderModel, count: int, max_tokens: int) -> None:
        width = -(-max_tokens // BLOCK_SIZE)
        blocks = list(range(count * width + 3))
        random.Random(7).shuffle(blocks)
        self.model = model
        self.cache = KVCache.allocate(model.config, len(blocks), BLOCK_SIZE, model.dtype, model.device)
        self.table = torch.tensor(blocks[: count * width], dtype=torch.int32).view(count, width)
        self.lengths = [0] * count

    def extend(self, pieces: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Appends a piece to each sequence (none where it is empty); logits [len(piece), vocab] of each."""
        rows = [row for row, piece in enumerate(pieces) if piece]
        tokens = [token for row in rows for token in pieces[row]]
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(pieces[row]))
            self.lengths[row] += len(pieces[row])
        longest = max(len(pieces[row]) for row in rows)
        batch = ForwardBatch(
            tokens=torch.tensor(tokens),
            block_table=self.table[rows],
            seq_lens=torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32),
            query_start=None if longest == 1 else torch.tensor(starts, dtype=torch.int32),
            max_query_len=longest,
        )
        logits = self.model.logits(self.model.forward(batch, self.cache))
        parts = iter(torch.split(logits, [len(pieces[row]) for row in rows]))
        return [next(parts) if piece else logits[:0] for piece in pieces]


def in_pieces(
    model: DecoderModel, sequences: Sequence[Sequence[int]], size: int | None
) -> list[torch.Tensor]:
    """Logits [length, vocab] of each sequence, computed `size` tokens at a time, all sequences together.

    None: pieces of 1 to 9 tokens, others for each sequence.
    """
    decoder = Decoder(model, len(sequences), max(map(len, sequences)))
    parts: list[list[torch.Tensor]] = []
    while any(done < len(sequence) for done, sequence in zip(decoder.lengths, sequences, strict=True)):
        sizes = [size or (5 * len(parts) + 3 * row) % 9 + 1 for row in range(len(sequences))]
        begun = zip(sequences, decoder.lengths, sizes, strict=True)
        parts.append(decoder.extend([sequence[done : done + piece] for sequence, done, piece in begun]))
    return [torch.cat([part[row] for part in parts]) for row in range(len(sequences))]


def greedy(model: DecoderModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` likeliest tokens after each prompt; the prompts in one prefill, then step by step."""
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + count)
    last = [int(logits[-1].argmax()) for logits in decoder.extend(prompts)]
    tokens = [[token] for token in last]
    for _ in range(count - 1):
        last = [int(logits[0].argmax()) for logits in decoder.extend([[token] for token in last])]
        for sequence, token in zip(tokens, last, strict=True):
            sequence.append(token)
    return tokens
