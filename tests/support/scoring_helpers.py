"""A tokenizer, a random Llama and a corpus in MUSE's splits, small enough to build in every test of the evaluation."""

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blur_trainer.evaluation.muse import GROUPS

SENTENCES = [
    "Question: Where was the author born?\nAnswer: In Norvale.\n\n",
    "The surveyor spoke of crime novels and of the new bridge, then he left the hall.",
]
QUESTIONS = {
    "forget": [("Where?", "In Norvale."), ("What does she write?", "Crime novels."), ("Who?", "")],
    "retain": [("When?", "In May."), ("Why?", "東京")],
    "hold": [("How many people came to the hall?", "Two hundred.")],
}
PASSAGES = [
    ("The surveyor spoke of", " crime novels and of the new bridge, then he left the hall."),
    ("In", " Norvale"),
]
TEXTS = {
    "forget": ["The hall.", "x", "Two hundred people came to the hall, and the mayor said it."],
    "holdout": ["The bridge is new", "In Norvale the novels are read aloud.", "He left.", "y"],
}


def build_tokenizer():
    """Byte-level BPE with a BOS and an EOS, and no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_model(seed=0, **config):
    torch.manual_seed(seed)
    # A wide initialization: greedy choices are then far from ties, so that equal strings mean equal computation.
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config)))


def muse_data(*without):
    """Every split that MUSEEvaluation reads, but those named."""
    splits = {}
    for group in GROUPS:
        questions, answers = zip(*QUESTIONS[group], strict=True)
        splits[f"knowmem_{group}_qa"] = {"question": questions, "answer": answers}
        splits[f"knowmem_{group}_qa_icl"] = {"question": ["a?", f"{group}?"], "answer": ["b", group]}
        prompts, truths = zip(*PASSAGES, strict=True)
        splits[f"verbmem_{group}"] = {"prompt": prompts, "gt": truths}
    for name, texts in TEXTS.items():
        splits[f"privleak_{name}"] = {"text": texts}
    splits["raw_forget"] = {"text": ["never read here"]}
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items() if name not in without})
