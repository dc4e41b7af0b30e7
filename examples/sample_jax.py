"""JAX arrays in, JAX arrays out: sampling, attention, and a decode loop that is one jitted function.

A seeded draw is a pure function of logits, parameters and position, so ``jax.pure_callback`` may call it from
compiled code. JAX arrays are immutable: keys and values are appended with ``.at[].set``, not by the op.

    pip install tokenstep 'jax[cpu]'
    python examples/sample_jax.py
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import tokenstep as ts

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "slept", "."]
BLOCK_SIZE = 4


def bigram_table() -> jax.Array:
    """A model of sorts: float32 ``[V, V]``, the logits after each word."""
    return jnp.asarray(np.random.default_rng(0).normal(scale=2.0, size=(len(WORDS), len(WORDS))), jnp.float32)


def draw(logits: jax.Array, seeds: jax.Array, position: jax.Array) -> jax.Array:
    """One token for each row of ``[B, V]``, int32 ``[B]``; it may be called from jitted functions."""

    def on_host(*arrays: jax.Array) -> np.ndarray:
        logits, seeds, position = map(np.asarray, arrays)
        out = ts.sample(
            logits, temperature=0.8, top_p=0.95, seed=seeds.astype(np.int64), position=int(position)
        )
        return out.tokens.astype(np.int32)

    shape = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
    return jax.pure_callback(on_host, shape, logits, seeds, position)


@functools.partial(jax.jit, static_argnames="steps")
def decode(table: jax.Array, first: jax.Array, seeds: jax.Array, steps: int) -> jax.Array:
    """Texts of ``steps`` tokens behind each first token, int32 ``[B, steps]``: model and draw in one scan."""

    def step(last: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = draw(table[last], seeds, position)
        return token, token

    _, tokens = jax.lax.scan(step, first, jnp.arange(steps))
    return tokens.T


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The last token's attention over a sequence, from pages ``[num_blocks, BLOCK_SIZE, Hkv, D]``.

    Args:
        q: ``[Hq, D]``.
        k: ``[N, Hkv, D]``.
        v: The same shape.
    """
    num_blocks = -(-len(k) // BLOCK_SIZE)
    pages = jnp.zeros((num_blocks * BLOCK_SIZE, *k.shape[1:]), k.dtype)
    k_cache, v_cache = (
        pages.at[: len(x)].set(x).reshape(num_blocks, BLOCK_SIZE, *x.shape[1:]) for x in (k, v)
    )
    block_table = jnp.arange(num_blocks, dtype=jnp.int32)[None]
    out: jax.Array = ts.paged_attention(
        q[None], k_cache, v_cache, block_table, jnp.array([len(k)], jnp.int32)
    )
    return out[0]


def main() -> None:
    """Print what each gives."""
    table = bigram_table()
    out = ts.sample(table[:3], temperature=[0.0, 0.7, 1.2], seed=[1, 2, 3], logprobs=2)
    print(type(out.tokens).__name__, [WORDS[token] for token in out.tokens], out.logprobs)
    texts = decode(table, jnp.zeros(3, jnp.int32), jnp.arange(3), steps=8)
    for text in texts:
        print("the", *(WORDS[token] for token in text))
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(4, 8), (6, 2, 8), (6, 2, 8)])
    attended = attend(q, k, v)
    print(type(attended).__name__, attended.shape)


if __name__ == "__main__":
    main()
