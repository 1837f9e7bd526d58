"""`ModelArgs`: the architecture of a model, as in a checkpoint's params.json."""

from dataclasses import dataclass

# (dim, n_layers) of Llama 3.2 1B and 3B. Their RoPE scaling factor is 32, but their params.json does not have it.
LLAMA_3_2_SHAPES = {(2048, 16), (3072, 28)}


@dataclass
class ModelArgs:
    """The keys of params.json, plus the two sizes of the runner (max_batch_size, max_seq_len).

    n_kv_heads: None means n_heads (no grouping).
    vocab_size: -1 means the number of rows of the embedding.
    head_dim: 0 means dim / n_heads.
    hidden_dim: the width of the feed-forward. 0 means 2/3 of 4 * dim, times ffn_dim_multiplier, rounded up to a
        multiple of multiple_of. `__post_init__` replaces the zeros of head_dim and hidden_dim by the derived sizes.
    use_scaled_rope: scale frequencies as in Llama 3.1. Those with fewer than rope_low_freq_factor turns within
        rope_original_context_length positions are divided by rope_scaling_factor, those with more than
        rope_high_freq_factor turns are unchanged, and those in between are blended.
    rope_scaling_factor: None means 32 for the two shapes of Llama 3.2 and 8 otherwise.
    rope_linear_factor: divides all positions instead (position interpolation).
    sliding_window: the number of positions back that a query may attend to; None means all. Sliding windows are not
        implemented: `Llama.build` refuses a max_seq_len above the window, and up to it the window has no effect.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    head_dim: int = 0
    hidden_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context_length: int = 8192
    rope_linear_factor: float | None = None
    sliding_window: int | None = None
    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.hidden_dim = self.hidden_dim or ffn_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def rope_factor(self) -> float:
        """The factor that low frequencies are divided by; 1 without scaling."""
        if not self.use_scaled_rope:
            return 1.0
        if self.rope_scaling_factor is not None:
            return self.rope_scaling_factor
        return 32.0 if (self.dim, self.n_layers) in LLAMA_3_2_SHAPES else 8.0


def ffn_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of a feed-forward: 2/3 of hidden_dim, times the multiplier, rounded up to a multiple of multiple_of."""
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return -(-width // multiple_of) * multiple_of
