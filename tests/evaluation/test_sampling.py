"""Sampled continuations: their distribution, their seeds, and that nothing else changes."""

from collections import Counter

import pytest
import torch
from support.cases import every
from support.models import VOCAB, tiny_llama
from support.tiny_tokenizer import tiny_tokenizer
from transformers import set_seed

from blur_trainer.evaluation import distributed
from blur_trainer.evaluation.sampling import sample, sample_ids


class Numbers:
    """A tokenizer whose text is the ids, so that a test sees tokens."""

    eos_token_id, pad_token_id = None, 0

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


def model(**kwargs):
    made = tiny_llama(**kwargs).eval()
    made.generation_config.eos_token_id = None
    return made


PROMPTS = [[1, 5, 9], [1, 4], [1, 7, 8, 9, 10]]
TINY = model()


def drawn(prompts=PROMPTS, of=TINY, **kwargs):
    options = {"num": 4, "max_new_tokens": 3, "seed": 0, "batch_size": 4}
    return sample(of, Numbers(), prompts, **(options | kwargs))


def test_the_first_token_is_drawn_from_the_models_distribution():
    def check(temperature, top_p):
        (texts,) = drawn([PROMPTS[0]], num=4000, max_new_tokens=1, temperature=temperature, top_p=top_p)
        with torch.no_grad():
            logits = TINY(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
        p = torch.softmax(logits / temperature, -1)
        if top_p < 1:
            order = p.argsort(descending=True)
            kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
            p = torch.zeros_like(p).scatter(0, kept, p[kept]) / p[kept].sum()
        counts = Counter(int(text) for text in texts)
        found = torch.tensor([counts[token] / 4000 for token in range(VOCAB)], dtype=torch.float64)
        assert found[p == 0].sum() == 0
        assert (found - p).abs().max() < 4 * (p.max() / 4000).sqrt()

    every([(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5)], check)


def test_a_models_own_sampling_does_not_count():
    changed = model()
    changed.generation_config.top_k, changed.generation_config.repetition_penalty = 1, 5.0
    assert drawn(of=changed) == drawn()
    assert changed.generation_config.top_k == 1


def test_the_seed_decides_and_the_callers_random_numbers_go_on():
    set_seed(3)
    expected = torch.rand(2)
    set_seed(3)
    first = drawn()
    assert torch.equal(torch.rand(2), expected)
    assert drawn() == first != drawn(seed=1)
    assert [len(texts) for texts in first] == [4, 4, 4] and len({*first[0]}) > 1
    assert all(len(text.split()) == 3 for texts in first for text in texts)


def test_texts_come_back_in_the_prompts_order():
    alone = [drawn([prompt])[0] for prompt in PROMPTS]
    assert drawn() == alone  # 4 samples a batch: a prompt each


def test_padding_on_the_left_changes_nothing():
    """Almost greedy, so that a batch and its members draw alike."""
    together = drawn(num=1, batch_size=3, temperature=1e-4)
    assert together == [drawn([prompt], num=1, temperature=1e-4)[0] for prompt in PROMPTS]


def test_a_text_ends_at_the_end_token_and_before_a_stop_string():
    (plain,) = drawn([PROMPTS[0]], num=1)
    end = model()
    end.generation_config.eos_token_id = int(plain[0].split()[1])
    assert drawn([PROMPTS[0]], of=end, num=1) == [[plain[0].split()[0]]]
    assert drawn([PROMPTS[0]], num=1, stop_strings=[plain[0].split()[2]])[0][0].split() == plain[0].split()[:2]


def test_the_mode_of_the_model_stays():
    training = model(dropout=0.5).train()
    assert drawn(of=training) == drawn()
    assert training.training


def test_alone_runs_everything_and_asks_no_other_process(monkeypatch):
    def nobody(*args):
        raise AssertionError("another process was asked")

    expected = drawn()
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(distributed.dist, "all_gather_object", nobody)
    assert drawn(alone=True) == expected
    with pytest.raises(AssertionError, match="another process"):
        drawn()


def test_wrong_arguments_are_named():
    def check(words, kwargs):
        with pytest.raises(ValueError, match=words):
            drawn(**kwargs)

    cases = [
        ("`num` must be an integer of at least 1, got 0", {"num": 0}),
        ("lower `max_new_tokens`", {"max_new_tokens": 60}),
        ("`stop_strings` must be", {"stop_strings": ""}),
    ]
    every(cases, check)
    with pytest.raises(ValueError, match="temperature"):
        drawn(temperature=0.0)


def test_special_tokens_are_not_in_the_text():
    tokenizer = tiny_tokenizer()
    end = tiny_llama()
    end.resize_token_embeddings(300)
    end.generation_config.eos_token_id = None
    (texts,) = sample(end, tokenizer, [[0, 40]], num=8, max_new_tokens=8)
    assert not any(special in text for text in texts for special in ("<s>", "<pad>"))


def test_batches_with_the_same_prompts_draw_differently():
    texts = [text for (text,) in drawn([PROMPTS[0]] * 8, num=1, max_new_tokens=6)]
    assert len({*texts}) == 8
    assert texts[:4] == [text for (text,) in drawn([PROMPTS[0]] * 4, num=1, max_new_tokens=6)]


def test_tokens_keep_the_end_and_what_did_not_end_has_none():
    options = {"num": 4, "max_new_tokens": 3, "seed": 0, "batch_size": 4}
    end = model()
    ids = sample_ids(end, Numbers(), PROMPTS, **options)
    assert [[" ".join(map(str, row)) for row in rows] for rows in ids] == drawn()
    end.generation_config.eos_token_id = ids[0][0][1]
    cut = sample_ids(end, Numbers(), PROMPTS, **options)[0]
    assert cut[0] == ids[0][0][:2] and {len(row) for row in cut} > {2}
    assert all(row[-1] != end.generation_config.eos_token_id for row in cut if len(row) == 3 and row not in cut[:1])
