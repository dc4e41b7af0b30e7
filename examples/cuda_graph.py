"""A decode loop as one CUDA graph: attention and sampling captured once, tokens fed back on the device.

A replay runs a whole step: it embeds the tokens that the last one drew, attends layer by layer, and draws the
next into the same memory. Lengths, parameters and histories are on the device too, so the host has nothing to
say between two steps but "again", and reads what was written when all is done. Requests may still come and
go: `admit` and `release` change rows between replays of the same graph.

    python examples/cuda_graph.py --batch 8 --steps 128     # without a GPU the same step is called directly
"""

from __future__ import annotations

import argparse
import time

import torch

import tokenstep as ts

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 2, 64, 16
HIDDEN = HEADS * HEAD_DIM


class Decoder:
    """A small transformer with random weights, and all that its decode step reads and writes."""

    def __init__(self, batch: int, steps: int, device: str, vocab: int = 4096, layers: int = 4) -> None:
        torch.manual_seed(0)
        weights = torch.randn(layers, 2 * HEADS + 2 * KV_HEADS, HEAD_DIM, HIDDEN, device=device) / HIDDEN**0.5
        self.weights = [w.split([HEADS, KV_HEADS, KV_HEADS, HEADS]) for w in weights]  # of q, k, v, output
        self.embedding, self.head = torch.randn(2, vocab, HIDDEN, device=device)

        blocks = -(-steps // BLOCK_SIZE)  # of a sequence
        shape = (layers, 2, batch * blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.caches = torch.zeros(shape, device=device)
        self.block_table = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
        frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(float(steps)), frequencies).to(device)
        self.rope = ts.Rope(angles.cos(), angles.sin())
        self.workspace = None  # of the CUDA kernel
        if device != "cpu":
            size = ts.attention_workspace_bytes(torch.cuda.current_device())
            self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)

        self.sampler = ts.Sampler(batch, vocab, device)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.drawn = ts.SampleOutput(self.tokens, torch.zeros(batch, dtype=torch.int32, device=device))
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.history = torch.zeros(batch, steps, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Each row starts from token 0, with parameters of its own."""
        self.tokens.zero_()
        self.seq_lens.zero_()
        for row in range(len(self.tokens)):
            params = ts.SamplingParams(
                temperature=0.7 + 0.1 * row, top_p=0.9, repetition_penalty=1.2, seed=row
            )
            self.sampler.admit(row, params, prompt_tokens=[0])

    def step(self) -> None:
        """One token a row. Nothing here waits, reads on the host, or depends on how far the sequences are."""
        self.seq_lens += 1
        x = self.embedding[self.tokens]
        for (wq, wk, wv, wo), (k_cache, v_cache) in zip(self.weights, self.caches, strict=True):
            normed = torch.nn.functional.rms_norm(x, (HIDDEN,))
            q, k, v = (torch.einsum("bh,ndh->bnd", normed, w) for w in (wq, wk, wv))
            attended = ts.paged_attention(
                q, k_cache, v_cache, self.block_table, self.seq_lens, k=k, v=v, rope=self.rope,
                out=torch.empty_like(q), workspace=self.workspace,
            )  # fmt: skip
            x = x + torch.einsum("bnd,ndh->bh", attended, wo)
        logits = torch.nn.functional.rms_norm(x, (HIDDEN,)) @ self.head.T / HIDDEN**0.5
        self.sampler.step(logits, out=self.drawn)  # into self.tokens, which the next step embeds
        self.history.scatter_(1, self.seq_lens[:, None].long() - 1, self.tokens[:, None])


def capture(decoder: Decoder) -> torch.cuda.CUDAGraph:
    """The step as a graph. It is run once before, since libraries allocate at their first call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decoder.begin()
        decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph


def main(arguments: list[str] | None = None) -> torch.Tensor:
    """Decode; returns the tokens, int64 [batch, steps]."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    decoder = Decoder(args.batch, args.steps, args.device)
    on_gpu = args.device != "cpu"
    again = capture(decoder).replay if on_gpu else decoder.step
    print("one CUDA graph, replayed" if on_gpu else "no GPU: the same step, called directly")

    decoder.begin()
    begin = time.perf_counter()
    for _ in range(args.steps):
        again()
    tokens = decoder.history.cpu()  # the first time that the host waits
    seconds = time.perf_counter() - begin
    print(f"{args.batch} × {args.steps} tokens, {1e3 * seconds / args.steps:.2f} ms a step")
    for row in tokens[:, :12].tolist():
        print(*row, "…")
    return tokens


if __name__ == "__main__":
    main()
