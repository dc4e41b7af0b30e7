"""What the decoder has to know of a model, whatever file and family it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tokenstep.models.errors import ModelFileError, UnsupportedConfig

__all__ = ["Activation", "ModelConfig", "RopeConfig", "RopeKind", "UnsupportedConfig"]

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over the whole head.

    Sources: RoFormer (Su et al., arXiv 2104.09864), YaRN (Peng et al., arXiv 2309.00071), and for llama3 the
    bands of Llama 3.1's own configuration.

    Attributes:
        theta: base of the frequencies, theta ** (-2 i / head_dim).
        kind: how frequencies are scaled for contexts longer than those of training.
        factor: divides the frequencies: all of them for linear, the low ones for llama3 and yarn.
        attention_factor: multiplies cos and sin.
        original_max_position: tokens of context before scaling, of llama3 and yarn.
        low_freq_factor: of llama3: frequencies with fewer turns over the original context are scaled whole.
        high_freq_factor: of llama3: those with more turns are not scaled.
        beta_fast: of yarn: the same, turns above which nothing is scaled.
        beta_slow: of yarn: turns below which all is scaled.
        truncate: of yarn: the bounds of the ramp between the two are whole dimensions.
        frequency_factors: [head_dim / 2], of kind "factors": divide the frequencies one by one (GGUF's
            `rope_freqs.weight`).
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only model and every switch in which the families differ.

    Attributes:
        family: its name, such as "llama".
        vocab_size: rows of the embedding, which may be more than the tokenizer has ids.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, of which num_heads is a multiple.
        head_dim: dimensions of a head, a multiple of 8 up to 256.
        intermediate_size: width of the MLP.
        max_position: tokens of the longest context.
        rms_norm_eps: added to the mean square in norms.
        rope: rotary positions.
        attention_scale: factor of the scores.
        windows: an entry a layer: the sliding window in tokens, or None for full attention.
        tie_embeddings: the output layer has the embedding's weights.
        eos_token_ids: tokens that end a text.
        bos_token_id: the token that begins one; None: there is none.
        activation: of the MLP's gate.
        qkv_bias: biases on the projections to queries, keys and values.
        o_bias: a bias on attention's output projection.
        mlp_bias: biases in the MLP.
        qk_norm: a norm on each head of queries and keys.
        post_norms: norms behind attention and MLP, beside those before them.
        embedding_scale: factor of the embeddings; None: 1.
        attention_softcap: c of c tanh(score / c); None: none.
        final_softcap: the same, of the logits.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_scale: float
    windows: tuple[int | None, ...]
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    activation: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None

    def sliding_window(self, layer: int) -> int | None:
        """The number of last positions that `layer` sees, itself included; None for all."""
        return self.windows[layer]

    @property
    def q_size(self) -> int:
        """Columns of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key heads, and as many of all value heads."""
        return self.num_kv_heads * self.head_dim

    def with_eos(self, ids: tuple[int, ...]) -> ModelConfig:
        """The same with `ids` added to the end tokens, each once, if the embedding has a row for it."""
        all_ids = dict.fromkeys(self.eos_token_ids + ids)
        return replace(self, eos_token_ids=tuple(i for i in all_ids if i < self.vocab_size))

    def check(self, source: str) -> ModelConfig:
        """Itself without end and begin ids that no row of the embedding has.

        Raises ModelFileError where numbers don't fit each other, UnsupportedConfig where the kernels can't
        follow.
        """
        where = f"tokenstep.load: {source}"
        if self.num_heads % self.num_kv_heads:
            raise ModelFileError(
                f"{where}: {self.num_heads} attention heads, expected a multiple of the {self.num_kv_heads}"
                " key-value heads"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise UnsupportedConfig(
                f"{where}: head_dim = {self.head_dim}, expected a multiple of 8 up to 256"
            )
        bos = self.bos_token_id
        known_bos = bos if bos is not None and bos < self.vocab_size else None
        return replace(self, bos_token_id=known_bos).with_eos(())
