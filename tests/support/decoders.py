"""Configurations of tiny decoders of several architectures, for what finds their layers by structure."""

from support.models import VOCAB
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

LAYERS = 3
COMMON = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
COMMON |= {"intermediate_size": 32, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=1),
    "mistral": MistralConfig(**COMMON, num_key_value_heads=1),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=1),
    "gemma2": Gemma2Config(**COMMON, num_key_value_heads=1, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
