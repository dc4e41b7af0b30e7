"""An engine in 100 lines: continuous batching over a paged cache, on `ts.paged_attention` and `ts.Sampler`.

Requests join and leave between steps. One forward pass serves prompts and sequences that decode alike (each
brings its new tokens, and `query_start` says which are whose), appends their keys and values to pages and
attends; one call samples for all, from parameters and histories that stay in the sampler. Weights are those
of a Llama model in transformers. What a real engine adds (prefix cache, pieces of prompts, preemption) is in
`tokenstep.engine`.

    python examples/engine.py "The capital of Germany is" "Once upon" --model HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

import tokenstep as ts


@dataclass(eq=False)
class Request:
    """A prompt on its way to ``max_tokens`` more tokens, or to ``eos``."""

    prompt: list[int]
    params: ts.SamplingParams = field(default_factory=ts.SamplingParams)
    max_tokens: int = 32
    tokens: list[int] = field(default_factory=list)
    row: int = -1  # in the sampler
    blocks: list[int] = field(default_factory=list)  # of the cache

    def new_tokens(self) -> list[int]:
        """What the model has not seen yet: the prompt, then the last token."""
        return self.tokens[-1:] or self.prompt


class Engine:
    """Runs requests on a Llama model of transformers."""

    def __init__(self, model: Any, max_rows: int = 8, num_blocks: int = 256, block_size: int = 16) -> None:
        config, weight = model.config, model.lm_head.weight
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (num_blocks, block_size, config.num_key_value_heads, head_dim)
        self.caches = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in model.model.layers]
        positions = torch.arange(num_blocks * block_size, device=weight.device)[None]
        cos, sin = (t[0, :, : head_dim // 2] for t in model.model.rotary_emb(weight.float(), positions))
        self.rope = ts.Rope(cos.contiguous(), sin.contiguous())
        self.model, self.head_dim, self.block_size = model, head_dim, block_size
        self.sampler = ts.Sampler(max_rows, config.vocab_size, weight.device)
        self.free_rows, self.free_blocks = list(range(max_rows)), list(range(num_blocks))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def admit(self) -> None:
        """First come, first served, while a row and all blocks that a request may need are free."""
        while self.waiting and self.free_rows:
            request = self.waiting[0]
            blocks = -(-(len(request.prompt) + request.max_tokens) // self.block_size)
            if blocks > len(self.free_blocks):
                break
            request.blocks = [self.free_blocks.pop() for _ in range(blocks)]
            request.row = self.free_rows.pop()
            self.sampler.admit(request.row, request.params, request.prompt)
            self.running.append(self.waiting.popleft())

    def forward(self, new: list[list[int]]) -> torch.Tensor:
        """Logits ``[B, V]`` after the new tokens of each running request."""
        model, device = self.model.model, self.model.device

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        query_start = torch.nn.functional.pad(
            ints([len(n) for n in new]).cumsum(0, dtype=torch.int32), (1, 0)
        )
        seq_lens = ints([len(r.prompt) + len(r.tokens) for r in self.running])
        tables = [torch.tensor(r.blocks, dtype=torch.int32) for r in self.running]
        block_table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(device)
        h = model.embed_tokens(ints([token for tokens in new for token in tokens]))
        for layer, (k_cache, v_cache) in zip(model.layers, self.caches, strict=True):
            x, a = layer.input_layernorm(h), layer.self_attn
            q, k, v = (p(x).view(len(x), -1, self.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
            out = ts.paged_attention(
                q, k_cache, v_cache, block_table, seq_lens, k=k, v=v, rope=self.rope,
                query_start=query_start, max_query_len=max(map(len, new)),
            )  # fmt: skip
            h = h + a.o_proj(out.flatten(1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        logits: torch.Tensor = self.model.lm_head(model.norm(h[query_start[1:] - 1]))
        return logits

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One token for every running request; returns those that are done."""
        self.admit()
        if not self.running:
            raise ValueError("the next request needs more blocks than there are, or there is none")
        logits = self.forward([r.new_tokens() for r in self.running])
        rows = torch.tensor([r.row for r in self.running], dtype=torch.int32, device=logits.device)
        for request, token in zip(self.running, self.sampler.step(logits, rows).tokens.tolist(), strict=True):
            request.tokens.append(token)
        eos = self.model.config.eos_token_id
        done = [r for r in self.running if r.tokens[-1] == eos or len(r.tokens) == r.max_tokens]
        for request in done:
            self.running.remove(request)
            self.sampler.release(request.row)
            self.free_rows.append(request.row)
            self.free_blocks += request.blocks
        return done

    def run(self, requests: list[Request]) -> None:
        """All requests to their end."""
        self.waiting.extend(requests)
        while self.waiting or self.running:
            self.step()


def main(arguments: list[str] | None = None) -> list[str]:
    """Complete the prompts together; returns the texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M", help="a name on the Hub, or a folder"
    )
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    engine = Engine(AutoModelForCausalLM.from_pretrained(args.model).eval())
    params = ts.SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=1)
    requests = [Request(tokenizer(text).input_ids, params, args.max_tokens) for text in args.prompts]
    engine.run(requests)
    texts = [text + tokenizer.decode(r.tokens) for text, r in zip(args.prompts, requests, strict=True)]
    print(*texts, sep="\n")
    return texts


if __name__ == "__main__":
    main()
