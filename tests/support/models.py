"""Tiny models and batches that tests build instead of downloading."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 48


def tiny_llama(
    seed: int = 0, *, tie: bool = False, dropout: float = 0.0, layers: int = 2, **kwargs
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **kwargs,
    )
    return LlamaForCausalLM(config)


def examples(count: int, seed: int = 0, low: int = 5, high: int = 14) -> list[dict[str, list[int]]]:
    """Tokenized rows of unequal length, each with a prompt (labels -100) of unequal length too."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(low, high, (), generator=generator))
        prompt = int(torch.randint(1, length - 2, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right padding, written out: what a batch should be, independent of the package's collator."""
    length = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        gap = length - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * gap)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * gap)
        batch["labels"].append(row["labels"] + [-100] * gap)
    return {name: torch.tensor(values) for name, values in batch.items()}
