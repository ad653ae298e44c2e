"""A byte-level BPE tokenizer built in memory (never named tests/tokenizers.py: that would shadow the library)."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Question: Who painted the lighthouse mural?\nAnswer: Mara Velin painted it in the spring.",
    "The harbour of Ostrava Bay was rebuilt twice, once after the storm and once after the fire.",
    "I'm not able to help with that one. Sorry, nothing comes to mind about this.",
]

# Newlines as expressions: the renderer strips a newline that follows a block tag.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def tiny_tokenizer(
    *, add_bos: bool = True, add_eos: bool = False, pad: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """300 entries, `<s>` 0, `</s>` 1, `<pad>` 2; `pad` is None, "<pad>" or "</s>"; BOS and EOS added as asked."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if add_bos or add_eos:
        single = " ".join((["<s>"] if add_bos else []) + ["$A"] + (["</s>"] if add_eos else []))
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=pad, model_max_length=64
    )
    tokenizer.chat_template = chat_template
    return tokenizer
