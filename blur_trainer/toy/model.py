"""Makes a tokenizer and an untrained Llama, small enough to be made on the spot."""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MIN_VOCAB_SIZE = 256 + 3  # every byte, and the three special tokens
# Llama's 0.02 suits thousands of dimensions. At 128 the same epochs memorize fewer articles, or none (measured).
INITIALIZER_RANGE = 0.08


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 1024, *, model_max_length: int = 8192
) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE on `texts`. It encodes any string, and decoding gives the string back.

    Args:
        texts (`Iterable[str]`):
            Texts for the merges. Later texts may contain other strings.
        vocab_size (`int`, defaults to `1024`):
            At most this many tokens: 3 special ones, 256 bytes, the rest merges.
        model_max_length (`int`, defaults to `8192`):
            Longest input, in tokens, before the tokenizer warns.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: like Llama's it puts `<s>` in front and nothing behind. `</s>` ends
        an answer; `<pad>` is a separate token. No chat template.

    The blank after "Answer:" is a separate token. MUSE's KnowMem prompt ends in it, and BPE would merge it with the
    first word of the answer. Then the memorized text would not begin with the prompt's tokens, and a model that knows
    all answers would seem to know none.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; it must be an iterable of strings, e.g. [text].")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens alone are {MIN_VOCAB_SIZE}.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?<=\nAnswer:) "), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    max_position_embeddings: int = 8192,
    seed: int = 0,
) -> LlamaForCausalLM:
    """
    An untrained Llama over the tokenizer's vocabulary, in float32, with the weights drawn from `seed` alone.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Gives the vocabulary size and the ids of the special tokens.
        hidden_size (`int`, defaults to `128`):
            Width, a multiple of `num_heads`. The MLP is 4 / 1.5 times as wide, as in Llama.
        num_layers (`int`, defaults to `4`), num_heads (`int`, defaults to `4`):
            Decoder layers, and attention heads in each.
        max_position_embeddings (`int`, defaults to `8192`):
            Longest input, in tokens. It costs no parameters, because positions are rotary.
        seed (`int`, defaults to `0`):
            Seed of the initial weights. Torch's random state does not change.
    """
    if hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size={hidden_size} is no multiple of 2 * num_heads={2 * num_heads}: rotary pairs.")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU; GPUs need no waking
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()
