"""Answers scored after a shared prompt against one sequence at a time."""

from itertools import chain

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.fake_device import DEVICE, FakeDevice
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from blur_trainer.evaluation import prompt_cache
from blur_trainer.evaluation.answer_scoring import can_share_prompts, score_variants
from blur_trainer.evaluation.batch_scores import BatchScores, ScoredRow
from blur_trainer.evaluation.token_scores import REJECTED, score_row, to_numpy
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}


def llama(**more):
    return LlamaForCausalLM(LlamaConfig(**(SIZES | more)))


def pair(weight=-0.8, top_logit_filter=0.0):
    target = llama(num_hidden_layers=3)
    assistant = lora_assistant(target, 2, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    config = LogitDifferenceConfig(weight=weight, top_logit_filter=top_logit_filter)
    return LogitDifferenceModel(config, target, assistant)


# name: (model, whether its cache can be shared). Windows shorter than the sequences: a wrong one would show.
MODELS = {
    "llama": (llama, True),
    "llama-without-use_cache": (lambda: llama(use_cache=False), True),
    "neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), True),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), True),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)), True),
    "mistral-window": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)), False),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=5)), False),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, n_positions=24, bos_token_id=0, eos_token_id=1)), True),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)), False),
    "difference": (pair, True),
    "difference-weight-0": (lambda: pair(weight=0.0), True),
    "lora": (lambda: get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False)), True),
    "prompt-tuning": (
        lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        False,
    ),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def make_questions(seed=0, count=7, longest=24):
    """Unequal prompts, answers and numbers of answers; some answers share tokens, some hold ids equal to padding."""
    rng = np.random.default_rng(seed)
    questions = []
    for index in range(count):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 12)).tolist()
        answers = [rng.integers(0, VOCAB, rng.integers(1, longest - 12)).tolist() for _ in range(1 + index % 4)]
        questions.append([example(prompt, answer) for answer in answers])
    return questions


def example(prompt, answer):
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@torch.no_grad()
def literal(model, row):
    """One sequence, one token at a time, in float64."""
    ids = row["input_ids"]
    offset = 3 if getattr(model, "peft_type", None) == "PROMPT_TUNING" else 0
    logits = model(input_ids=torch.tensor([ids])).logits[0, offset:].double()
    found = {"tokens": [], "logps": [], "predicted": [], "means": [], "variances": []}
    for t in range(1, len(ids)):
        if row["labels"][t] == -100:
            continue
        logps = torch.log_softmax(logits[t - 1], -1)
        p = logps.exp()
        mean = float((p * logps).sum())
        found["tokens"].append(ids[t])
        found["logps"].append(float(logps[ids[t]]))
        found["predicted"].append(int(logits[t - 1].argmax()))
        found["means"].append(mean)
        found["variances"].append(float((p * (logps - mean) ** 2).sum()))
    return found


def assert_is_literal(model, questions, scores):
    assert [len(answers) for answers in scores] == [len(question) for question in questions]
    for question, answers in zip(questions, scores, strict=True):
        for number, (row, score) in enumerate(zip(question, answers, strict=True)):
            truth = literal(model, row)
            assert score.tokens.tolist() == truth["tokens"]
            assert score.logps == pytest.approx(truth["logps"], abs=2e-5)
            assert score.nll == pytest.approx(-np.mean(truth["logps"]), abs=2e-5)
            if number == 0:
                assert score.predicted.tolist() == truth["predicted"]
                assert score.means == pytest.approx(truth["means"], abs=2e-5)
                assert score.variances == pytest.approx(truth["variances"], rel=1e-4, abs=1e-5)
            else:
                assert score.predicted is score.means is score.variances is None


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_one_sequence_at_a_time(name):
    model, questions = build(name), make_questions()
    scores = score_variants(model, questions, pad_token_id=0, batch_size=4, details=True)
    assert_is_literal(model, questions, scores)


@pytest.mark.parametrize("name", MODELS)
def test_only_plain_caches_are_shared(name):
    assert can_share_prompts(build(name)) is MODELS[name][1]


class Counting:
    """Counts rows and tokens of every forward pass of a model."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_a_prompt_is_run_once_for_all_its_answers():
    prompt, answers = [5, 6, 7, 8, 9], [[10, 11, 12], [13, 14], [15, 16, 17]]
    questions = [[example(prompt, answer) for answer in answers]]
    model = build("llama")
    counting = Counting(model)
    score_variants(model, questions, pad_token_id=0)
    assert counting.shapes == [(1, 2), (1, 4), (3, 4)]  # the probe, the prompt less a token, what follows
    model = build("mistral-window")
    counting = Counting(model)
    score_variants(model, questions, pad_token_id=0)
    assert counting.shapes == [(1, 2), (3, 8)]


def test_no_pass_has_more_rows_than_the_batch_size():
    model, questions = build("llama"), make_questions(count=9)
    counting = Counting(model)
    score_variants(model, questions, pad_token_id=0, batch_size=3)
    assert max(rows for rows, _ in counting.shapes) == 3


def test_every_batch_takes_equally_many_passes_where_passes_are_collectives(monkeypatch):
    from blur_trainer.evaluation import answer_scoring as variants

    monkeypatch.setattr(variants, "is_sharded", lambda model: True)
    model = build("llama")
    # of the first two questions, which are longest, three answers each; of the others one batch of two each
    questions = [[example([3, 4], [index] * (9 - index)) for index in range(number)] for number in (3, 3, 2, 2)]
    counting = Counting(model)
    scores = score_variants(model, questions, pad_token_id=0, batch_size=2, details=True)
    per_batch = len(counting.shapes[1:]) / 2
    assert per_batch == 1 + 3  # the prompts, and as many as the six answers need
    assert_is_literal(model, questions, scores)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing(batch_size):
    model, questions = build("llama"), make_questions(seed=3)
    assert_is_literal(
        model, questions, score_variants(model, questions, pad_token_id=9, batch_size=batch_size, details=True)
    )


def test_the_common_prefix_is_of_tokens_not_of_prompts():
    # the last prompt token differs (it has merged with the answer); then answers that begin alike, one of one token
    merged = [
        {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
        {"input_ids": [3, 4, 7], "labels": [-100, -100, 7]},
        {"input_ids": [3, 8, 9, 10], "labels": [-100, 8, 9, 10]},
    ]
    alike = [example([3, 4, 5], [6, 7, 8]), example([3, 4, 5], [6, 7, 9]), example([3, 4, 5], [6])]
    nothing = [example([3], [4, 5]), example([6], [4, 5])]
    short = [example([3], [4]), example([3], [5])]
    gap = [{"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100, -100, 5, -100, 7, 8]}, example([3, 4], [9])]
    same = [example([3, 4], [5, 6]), example([3, 4], [5, 6])]
    model, questions = build("llama"), [merged, alike, nothing, short, gap, same]
    assert_is_literal(model, questions, score_variants(model, questions, pad_token_id=0, details=True))


def test_positions_of_padding_stay_within_the_model():
    # the longest prompt with the longest answer's padding would reach beyond position 23
    model = build("gpt2")
    questions = [[example(list(range(2, 22)), [3]), example(list(range(2, 22)), [4, 5])]]
    questions += [[example([2, 3], list(range(20))), example([2, 3], [9])]]
    assert_is_literal(model, questions, score_variants(model, questions, pad_token_id=0, details=True))


def test_a_barred_token_has_a_finite_loss_and_a_distribution():
    """Logits of -inf, as of a model that never says some tokens."""
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    logits[:, :4] = -torch.inf
    (score,) = to_numpy([score_row(logits, [0, 2], [1, 7], True)])
    assert score.logps[0] == REJECTED
    assert score.logps[1] == pytest.approx(float(logits[2].log_softmax(-1)[7]), abs=1e-6)
    assert np.isfinite(score.means).all() and (score.variances >= 0).all()


def test_the_filter_of_a_logit_difference_bars_no_token():
    model = pair(top_logit_filter=0.3).eval()
    scores = score_variants(model, make_questions(seed=5, count=4), pad_token_id=0, details=True)
    assert min(score.logps.min() for answers in scores for score in answers) > REJECTED


def test_nan_stays_nan():
    (score,) = to_numpy([score_row(torch.full((2, 5), float("nan")), [0, 1], [3, 4], True)])
    assert np.isnan(score.logps).all()


def test_half_precision_is_normalized_in_float32():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    (score,) = to_numpy([score_row(logits, [0, 2], [3, 4], False)])
    truth = logits.double().log_softmax(-1)
    assert score.logps == pytest.approx([float(truth[0, 3]), float(truth[2, 4])], abs=1e-6)


def test_modes_and_gradients_are_left_as_they_were():
    model = build("llama").train()
    score_variants(model, make_questions(count=2), pad_token_id=0)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([[]], r"`questions\[0\]` has no answer"),
        ([[{"input_ids": [1, 2]}]], "lacks"),
        ([[{"input_ids": [1, 2], "labels": [1, -100]}]], r"`questions\[0\]\[0\]` has no scored token"),
        ([[{"input_ids": [1, 2], "labels": [-100, 3]}]], "neither -100 nor its input_ids"),
        ([[example(list(range(40)), list(range(20)))]], "has 60 tokens. The model takes 48"),
    ],
)
def test_bad_input_is_refused_before_any_score(questions, message):
    with pytest.raises(ValueError, match=message):
        score_variants(build("llama"), questions, pad_token_id=0)


def test_no_questions_no_scores():
    assert score_variants(build("llama"), [], pad_token_id=0) == []
    with pytest.raises(ValueError, match="`batch_size`"):
        score_variants(build("llama"), [], pad_token_id=0, batch_size=0)


# --- on an accelerator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_an_accelerator_scores_a_batch_at_once_and_the_same(name):
    model, questions = build(name), make_questions()[:4]
    expected = score_variants(model, questions, pad_token_id=0, batch_size=5, details=True)
    with FakeDevice() as fake:
        scores = score_variants(model.to(DEVICE), questions, pad_token_id=0, batch_size=5, details=True)
    for row, truth in zip(chain(*scores), chain(*expected), strict=True):
        for field in ("tokens", "logps", "predicted", "means", "variances"):
            a, b = getattr(row, field), getattr(truth, field)
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and a == pytest.approx(b, rel=1e-5, abs=1e-5))
    waits = sum(n for key, n in fake.waits.items() if key.startswith("blur_trainer/"))
    assert waits == (3 if name == "llama" else 2)  # one per pass: one answer; nine after shared prompts, or ten


def test_rejected_tokens_and_nan_on_an_accelerator():
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    logits[0, :, :4], logits[1] = -torch.inf, torch.nan
    rows = [ScoredRow([0, 2], [1, 7], True), ScoredRow([1], [3])]
    first, second = BatchScores(rows, torch.device("cpu"))(logits)
    (truth,) = to_numpy([score_row(logits[0], [0, 2], [1, 7], True)])
    assert first.logps[0] == REJECTED and first.logps.tolist() == truth.logps.tolist()
    assert first.means.tolist() == truth.means.tolist() and first.variances.tolist() == truth.variances.tolist()
    assert np.isnan(second.logps).all() and second.means is None


@pytest.mark.parametrize("name", ["llama", "difference"])
@torch.no_grad()
def test_rows_of_a_cache_are_copied_and_nothing_else(name):
    model, rows = build(name), torch.tensor([2, 0, 2])
    ids = torch.randint(2, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    with FakeDevice() as fake:
        cache = model.to(DEVICE)(input_ids=ids.to(DEVICE), use_cache=True).past_key_values
        before = [(layer.keys, layer.values) for layer in cache.layers]
        fake.bytes.clear()
        selected = prompt_cache.rows_of(cache, rows.to(DEVICE))
        copied = sum(fake.bytes.values()) - rows.numel() * rows.element_size()
    assert type(selected) is type(cache)
    assert copied == sum(x.inner.numel() * x.inner.element_size() for pair in before for x in pair)  # three of three
    for layer, kept, new in zip(cache.layers, before, selected.layers, strict=True):
        assert layer.keys is kept[0] and layer.values is kept[1]
        assert torch.equal(new.keys.inner, kept[0].inner[rows]) and torch.equal(new.values.inner, kept[1].inner[rows])
    if name == "difference":
        assert selected.target.layers[0] is selected.layers[0] and selected.assistant.layers[0] is selected.layers[3]
