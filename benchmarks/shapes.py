"""Shapes of Llamas, from a few million to 70 billion parameters. No weights."""

from typing import Any

from transformers import LlamaConfig

VOCAB = 8192


def llama(width: int, layers: int, **kwargs: Any) -> LlamaConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(shape | kwargs))


# Shapes of SmolLM2 135M, Llama 3.2 1B and 3B, 3.1 8B and 70B
LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES = {
    "0.1B": llama(
        576,
        30,
        vocab_size=49152,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "1B": llama(2048, 16, **LLAMA_3, intermediate_size=8192, num_attention_heads=32, tie_word_embeddings=True),
    "3B": llama(3072, 28, **LLAMA_3, intermediate_size=8192, num_attention_heads=24, tie_word_embeddings=True),
    "8B": llama(4096, 32, **LLAMA_3, intermediate_size=14336, num_attention_heads=32),
    "70B": llama(8192, 80, **LLAMA_3, intermediate_size=28672, num_attention_heads=64),
}
