import copy
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.fake_device import DEVICE, FakeDevice
from support.scoring_helpers import SENTENCES, build_model, build_tokenizer
from transformers import GenerationConfig

from blur_trainer.evaluation import batch_scores, batching, scoring
from blur_trainer.evaluation.scoring import generate, token_logps
from blur_trainer.models.forward import evaluating

PROMPTS = ["The", SENTENCES[1], "Question: Where?\nAnswer: ", "", "spoke of crime novels and", "In Norvale é 東京"]
LONGEST = 16


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    return build_model().eval()


def make_examples(seed=0, lengths=(9, 3, 17, 1, 2, 30, 9), eos=1):
    """Unequal lengths; prompts masked; a real EOS inside and at the end (equal to the pad id that the tests use)."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        input_ids = rng.integers(2, 300, size=length).tolist()
        input_ids[length // 2] = input_ids[-1] = eos
        prompt = int(rng.integers(0, length // 2 + 1))
        examples.append({"input_ids": input_ids, "labels": [-100] * prompt + input_ids[prompt:]})
    examples[2]["labels"] = [-100] * len(examples[2]["labels"])  # nothing to score
    examples[5]["labels"][20] = -100  # a hole in the answer
    return examples


@pytest.fixture(scope="module")
def literal_logps():
    """Of `make_examples()`: one forward pass per scored token, on the tokens before it."""
    model = build_model().eval()  # the weights of the `model` fixture
    rows = []
    for example in make_examples():
        row = []
        for t in range(1, len(example["labels"])):
            if example["labels"][t] != -100:
                with torch.no_grad():
                    logits = model(torch.tensor([example["input_ids"][:t]])).logits[0, -1]
                row.append(torch.log_softmax(logits.double(), dim=-1)[example["labels"][t]].item())
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def literal(tokenizer):
    """Greedy continuations one prompt and one token at a time: no cache, padding, masks or `generate`."""
    model = build_model().eval()  # the weights of the `model` fixture

    @cache
    @torch.no_grad()
    def token_ids(prompt):
        ids = tokenizer(prompt)["input_ids"]
        prompt_length = len(ids)
        for _ in range(LONGEST):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[prompt_length:]

    def texts(max_new_tokens, eos_ids=(1,), prompts=PROMPTS):
        rows = [token_ids(prompt)[:max_new_tokens] for prompt in prompts]
        ends = [next((t for t, token in enumerate(row) if token in eos_ids), len(row)) for row in rows]
        return [tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(rows, ends, strict=True)]

    texts.token_ids = token_ids
    return texts


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("pad_token_id", [1, 299])
def test_logps_are_the_definition_whatever_the_batch(model, literal_logps, batch_size, pad_token_id):
    rows = token_logps(model, make_examples(), pad_token_id=pad_token_id, batch_size=batch_size)
    assert [row.tolist() for row in rows] == [pytest.approx(expected, abs=1e-5) for expected in literal_logps]
    assert all(row.dtype == np.float32 for row in rows)
    assert sum(len(row) for row in rows) > 30


def test_an_example_without_a_scored_label_gives_an_empty_row(model):
    rows = token_logps(model, make_examples(), pad_token_id=1)
    assert rows[2].shape == rows[3].shape == (0,)  # all labels -100; one token, which has no context
    assert rows[5].shape == (sum(label != -100 for label in make_examples()[5]["labels"][1:]),)


def test_logps_of_a_dataset_and_of_nothing(model):
    examples = make_examples()
    from_list = token_logps(model, examples, pad_token_id=1)
    from_dataset = token_logps(model, Dataset.from_list(examples), pad_token_id=1)
    assert all((a == b).all() for a, b in zip(from_list, from_dataset, strict=True))
    assert token_logps(model, [], pad_token_id=1) == []


def test_half_precision_logits_are_normalized_in_float32(model):
    examples = make_examples()
    half = build_model().to(torch.bfloat16).eval()
    rows = token_logps(half, examples, pad_token_id=1, batch_size=1)
    for row, example in zip(rows, examples, strict=True):
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            logits = half(ids).logits[0, :-1].float()
        scored = labels[1:] != -100
        expected = torch.log_softmax(logits[scored], -1).gather(-1, labels[1:][scored, None])[:, 0]
        assert row.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_row_outlives_its_batch(model):
    row = token_logps(model, make_examples(), pad_token_id=1)[0]
    assert row.flags.owndata and row.flags.writeable


@pytest.mark.parametrize(
    ("examples", "kwargs", "error", "message"),
    [
        ([{"input_ids": [2, 3]}], {}, ValueError, r"`examples\[0\]` lacks \['labels'\]"),
        ([{"input_ids": [2, 3], "labels": [3]}], {}, ValueError, "2 input_ids and 1 labels"),
        (
            [{"input_ids": [2], "labels": [2]}, {"input_ids": [], "labels": []}],
            {},
            ValueError,
            r"`examples\[1\]` has 0",
        ),
        ([{"input_ids": [2] * 257, "labels": [2] * 257}], {}, ValueError, "257 tokens. The model takes 256"),
        ([], {"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1, got 0"),
        ([], {"batch_size": True}, ValueError, "`batch_size`"),
        ([], {"pad_token_id": None}, TypeError, "`pad_token_id` must be an integer, got None"),
    ],
)
def test_logps_refuse_bad_input(model, examples, kwargs, error, message):
    with pytest.raises(error, match=message):
        token_logps(model, examples, **({"pad_token_id": 1} | kwargs))


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_generation_is_greedy_whatever_the_batch(model, tokenizer, literal, batch_size):
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert texts == literal(12)
    assert len(set(texts)) > 3  # the prompts matter


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("pad_token", [None, "</s>", "!"])
def test_a_row_ends_at_its_eos_and_the_others_go_on(model, literal, pad_token, as_list):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = pad_token  # "!" is an ordinary token: were it decoded, it would show
    greedy = literal(10, eos_ids=())
    eos = literal.token_ids(PROMPTS[0])[2]  # what the model says third after the first prompt
    eos_ids = [1, eos] if as_list else [eos]
    model.generation_config.eos_token_id = eos_ids if as_list else eos
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=10, batch_size=3)
    assert texts == literal(10, eos_ids)
    assert len(texts[0]) < len(greedy[0])
    assert any(text == full for text, full in zip(texts, greedy, strict=True))
    assert tokenizer.pad_token == pad_token


def test_without_any_eos_every_row_is_full(model, tokenizer, literal):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    assert texts == literal(6, eos_ids=())


def test_the_eos_of_the_tokenizer_serves_a_model_that_names_none(model, tokenizer, literal):
    tokenizer = copy.deepcopy(tokenizer)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(literal.token_ids(PROMPTS[0])[0])
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6) == [""]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stop_strings_cut_the_text_and_stop_the_row(model, tokenizer, literal, batch_size, monkeypatch):
    full = literal(LONGEST)
    stops = sorted({text[5:7] for text in full if text[5:7].isascii() and text[5:7]})[:2]
    expected = [min((text.split(stop)[0] for stop in stops), key=len) for text in full]
    assert stops and expected != full
    steps = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: steps.append(1) or forward(*args, **kwargs))
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=LONGEST, batch_size=batch_size, stop_strings=stops)
    assert texts == expected
    if batch_size == 1:
        assert len(steps) < LONGEST * len(PROMPTS)  # not generated in full and cut afterwards


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 2.0, "top_k": 300},
        {"repetition_penalty": 5.0},
        {"num_beams": 4},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(2, 200))},
        {"max_length": 8},
        {"min_new_tokens": 12},
        {"use_cache": False},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_checkpoints_own_way_of_generating_does_not_enter(model, tokenizer, literal, own):
    expected = literal(8)
    model.generation_config = GenerationConfig(eos_token_id=1, **own)
    before, identity = model.generation_config.to_dict(), model.generation_config
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert model.generation_config is identity
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_training_change_nothing_and_come_back(tokenizer, literal, reentrant):
    model = build_model(attention_dropout=0.5)
    expected = literal(8)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()  # its owner keeps this part in evaluation mode
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3) == expected
    token_logps(model, make_examples(), pad_token_id=1)
    assert model.config.use_cache is False
    assert model.model.layers[1].gradient_checkpointing
    assert model.training and model.model.layers[1].self_attn.training
    assert not model.model.layers[0].training and not model.model.layers[0].self_attn.training


def test_training_goes_on_after_an_evaluation(tokenizer):
    model = build_model()
    generate(model, tokenizer, PROMPTS[:2], max_new_tokens=4)
    token_logps(model, make_examples(), pad_token_id=1)
    ids = torch.randint(2, 300, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_flags_come_back_after_an_error(model, tokenizer, monkeypatch):
    model.train()
    own = model.generation_config

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", broken)
    for run in (
        lambda: generate(model, tokenizer, PROMPTS, max_new_tokens=4),
        lambda: token_logps(model, make_examples(), pad_token_id=1),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
        assert model.training and torch.is_grad_enabled()
        assert model.generation_config is own


def test_evaluating_disables_dropout_and_gradients():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)).train()
    with evaluating(module):
        output = module(torch.ones(1, 3))
        assert not output.requires_grad and not output.is_inference()
        assert not module[1].training
    assert module[1].training


def test_a_peft_model_is_evaluated_as_its_base_and_keeps_its_configuration(model, tokenizer, literal):
    expected = literal(6)
    logps = token_logps(model, make_examples(), pad_token_id=1)
    own = model.generation_config = GenerationConfig(eos_token_id=1, repetition_penalty=5.0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert generate(wrapped, tokenizer, PROMPTS, max_new_tokens=6) == expected  # a fresh adapter adds nothing
    for row, before in zip(token_logps(wrapped, make_examples(), pad_token_id=1), logps, strict=True):
        assert row.tolist() == pytest.approx(before.tolist(), abs=1e-5)
    assert wrapped.generation_config is own and model.generation_config is own


def test_the_tokenizer_is_left_as_it_was(model):
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    before = {key: value for key, value in vars(tokenizer).items() if key != "_tokenizer"}, tokenizer.padding_side
    before = copy.deepcopy(before)
    backend = tokenizer.backend_tokenizer.to_str()
    generate(model, tokenizer, PROMPTS, max_new_tokens=3)
    assert (
        {key: value for key, value in vars(tokenizer).items() if key != "_tokenizer"},
        tokenizer.padding_side,
    ) == before
    assert tokenizer.backend_tokenizer.to_str() == backend
    assert tokenizer.pad_token is None


def test_no_prompts_no_texts(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "kwargs", "error", "message"),
    [
        ("one text", {}, TypeError, "`prompts` must be a list of strings"),
        (["a"], {"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be an integer of at least 1"),
        (["a"], {"batch_size": 2.0}, ValueError, "`batch_size` must be an integer of at least 1, got 2.0"),
        (["a"], {"stop_strings": "stop"}, ValueError, "`stop_strings` must be a list of non-empty strings"),
        (["a"], {"stop_strings": ["stop", ""]}, ValueError, "`stop_strings` must be a list of non-empty strings"),
        (["a", "z" * 252], {}, ValueError, r"`prompts\[1\]` has 253 tokens and `max_new_tokens` is 4: 257 in all"),
    ],
)
def test_generation_refuses_bad_input(model, tokenizer, prompts, kwargs, error, message):
    with pytest.raises(error, match=message):
        generate(model, tokenizer, prompts, **({"max_new_tokens": 4} | kwargs))


def test_a_prompt_may_fill_the_context_exactly(model, tokenizer):
    assert len(generate(model, tokenizer, ["z" * 251], max_new_tokens=4)) == 1


def test_a_prompt_without_a_token_is_refused(model):
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # no BOS
    with pytest.raises(ValueError, match=r"`prompts\[1\]` \(''\) has no token to continue"):
        generate(model, tokenizer, ["a", ""], max_new_tokens=4)


# --- batches and bars -------------------------------------------------------------------------------------------------


def test_buckets_hold_every_index_once_longest_first():
    lengths = [3, 9, 1, 9, 5, 2, 7]
    found = list(batching.buckets(lengths, 3))
    assert sorted(i for bucket in found for i in bucket) == list(range(7))
    assert [len(bucket) for bucket in found] == [3, 3, 1]
    assert [lengths[i] for bucket in found for i in bucket] == sorted(lengths, reverse=True)
    assert list(batching.buckets([], 3)) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_follows_the_length_not_the_pad_id(side):
    ids, mask = batching.pad([[1, 5, 1], [1]], 1, side, torch.device("cpu"))
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[1, 5, 1], [1, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1] if side == "left" else [1, 0, 0]]


def test_progress_bars_only_with_a_description(model, tokenizer, capfd):
    generate(model, tokenizer, ["a"], max_new_tokens=2)
    token_logps(model, make_examples(), pad_token_id=1)
    assert capfd.readouterr().err == ""
    generate(model, tokenizer, ["a"], max_new_tokens=2, desc="VerbMem forget")
    token_logps(model, make_examples(), pad_token_id=1, desc="PrivLeak forget")
    bars = capfd.readouterr().err
    assert "VerbMem forget: 100%" in bars and "1/1" in bars
    assert "PrivLeak forget: 100%" in bars and "7/7" in bars


def test_only_scored_positions_are_normalized(model, monkeypatch):
    shapes = []
    logsumexp = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda self, dim: shapes.append(self.shape) or logsumexp(self, dim))
    examples = make_examples()
    scoring.token_logps(model, examples, pad_token_id=1)
    assert sum(shape[0] for shape in shapes) == sum(sum(label != -100 for label in e["labels"][1:]) for e in examples)


# --- stop strings, exactly --------------------------------------------------------------------------------------------


def stopped(tokenizer, tokens, stops):
    """Looks at the text after each token, from the beginning: the text up to the first string that it then has."""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_stop_strings_end_a_row_at_the_token_that_completes_one(model, tokenizer, literal, device):
    """Some strings begin before others and would be complete later: a look at the whole text would find them first."""
    count, length = (12, LONGEST) if device == "cpu" else (4, 8)
    rng = np.random.default_rng(0)
    prompts = ["".join(rng.choice(list("abcdefgh. "), 1 + n % 7)) for n in range(count)]
    full = literal(length, prompts=prompts)
    characters = Counter(char for text in full for char in text if char != "\N{REPLACEMENT CHARACTER}")
    some = [char for char, _ in characters.most_common()[len(characters) // 2 :: 9]]
    stops = [*(text[2:8] for text in full[::4]), *(text[3:5] for text in full[::4]), *some]
    rows = [literal.token_ids(prompt)[:length] for prompt in prompts]
    rows = [row[: row.index(1)] if 1 in row else row for row in rows]
    expected = [stopped(tokenizer, row, stops) for row in rows]
    assert {*expected} & {*full} and {*expected} - {*full}  # rows that stop, and rows that do not
    settings = {"max_new_tokens": length, "batch_size": 7, "stop_strings": stops}
    if device == "cpu":
        assert generate(model, tokenizer, prompts, **settings) == expected
        return
    with FakeDevice() as fake:
        assert generate(model.to(DEVICE), tokenizer, prompts, **settings) == expected
    assert sum(n for key, n in fake.waits.items() if "stopping.py" in key) <= length
    assert sum(n for key, n in fake.uploads.items() if "stopping.py" in key) in range(1, length)  # when a row ends


# --- on an accelerator ------------------------------------------------------------------------------------------------


def ours(counts):
    return sum(number for key, number in counts.items() if key.startswith("blur_trainer/"))


@pytest.mark.parametrize("elements", [None, 700])
def test_an_accelerator_scores_a_batch_at_once_and_the_same(model, monkeypatch, elements):
    expected = token_logps(model, make_examples(), pad_token_id=1)
    if elements:  # two tokens at a time
        monkeypatch.setattr(batch_scores, "_ELEMENTS", elements)
    with FakeDevice() as fake:
        rows = token_logps(model.to(DEVICE), make_examples(), pad_token_id=1)
    assert [len(row) for row in rows] == [len(row) for row in expected]
    for row, truth in zip(rows, expected, strict=True):
        assert row.tolist() == pytest.approx(truth.tolist(), abs=1e-5)
    assert ours(fake.waits) == 1 and ours(fake.uploads) == 2  # tokens with their mask; what to score
