"""Samples of a prompt that is read once: the tokens of the literal way, which reads it for each sample."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.models import VOCAB, tiny_llama
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from blur_trainer.evaluation import sampling
from blur_trainer.evaluation.sampling import sample_ids
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant

PROMPTS = [[1, 5, 9, 11], [1, 4, 8], [1, 7, 8, 9, 10, 12]]
SAMPLES, NEW = 4, 5


class NoTokenizer:
    """Only what tokens to tokens needs."""

    eos_token_id, pad_token_id = None, 0


def lora():
    return get_peft_model(tiny_llama(), LoraConfig(r=4, init_lora_weights=False))


def pair():
    target = tiny_llama()
    assistant = lora_assistant(target, 1, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return LogitDifferenceModel(LogitDifferenceConfig(weight=-0.8, top_logit_filter=0.0), target, assistant)


def window():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=3, eos_token_id=2))


def prompt_tuned():
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


# name: (model, whether it reads a prompt once)
MODELS = {
    "whole": (tiny_llama, True),
    "lora": (lora, True),
    "difference": (pair, True),
    "window": (window, False),
    "prompt-tuning": (prompt_tuned, False),
}


def drawn(model, prompts=PROMPTS, **kwargs):
    options = {"num": SAMPLES, "max_new_tokens": NEW, "seed": 3, "batch_size": 8}
    return sample_ids(model, NoTokenizer(), prompts, **(options | kwargs))


def literal(model, prompts, counts, end=2):
    """`generate` of transformers on one batch, which reads each prompt for each of its samples."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    found = [[] for _ in prompts]
    with torch.random.fork_rng([]):
        torch.manual_seed(sampling._seeds(3, [prompts])[0])
        for count in counts:
            how = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "num_return_sequences": count}
            config = GenerationConfig(**how, pad_token_id=0, eos_token_id=end)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for index, row in enumerate(output[:, width:].tolist()):
                found[index // count].append(row[: row.index(end) + 1] if end in row else row)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_a_prompt_read_for_each_sample(name):
    model = MODELS[name][0]().eval()
    batches = [[PROMPTS[2], PROMPTS[0]], [PROMPTS[1]]]  # eight samples, the longest prompts first
    first, last = (literal(model, rows, [SAMPLES]) for rows in batches)
    want = [first[1], last[0], first[0]]
    assert drawn(model) == want
    assert drawn(model, share_prompts=True) == want
    assert len({tuple(row) for rows in want for row in rows}) > SAMPLES  # there is something to tell apart


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_read_once_where_the_cache_allows_it(name, monkeypatch):
    model, once = MODELS[name][0]().eval(), MODELS[name][1]
    read = []
    decoder = model.target if name == "difference" else model
    embeddings = decoder.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    drawn(model, [PROMPTS[0]], share_prompts=True)
    length = len(PROMPTS[0])
    assert ((1, length - 1) in read) is once
    assert (max(rows * width for rows, width in read) >= SAMPLES * length) is not once


def test_no_more_samples_are_written_at_a_time_than_the_batch_size():
    model = tiny_llama().eval()
    sizes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = drawn(model, [PROMPTS[0]], num=7, batch_size=3, share_prompts=True)
    assert max(sizes) == 3 and [len(rows) for rows in found] == [7]
    assert found == literal(model, [PROMPTS[0]], [3, 3, 1])


def test_a_prompt_of_one_token_has_nothing_to_share():
    model = tiny_llama().eval()
    prompts = [[5], [1, 4, 8]]
    assert drawn(model, prompts, share_prompts=True) == drawn(model, prompts)


def test_a_token_of_the_caller_ends_a_sample():
    model = tiny_llama().eval()
    end = drawn(model, [PROMPTS[0]])[0][0][1]
    (rows,) = drawn(model, [PROMPTS[0]], ends=[end])
    assert rows[0][-1] == end and all(end not in row[:-1] for row in rows)
