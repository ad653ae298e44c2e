"""The tokenizer gives back what it was given; the tiny model learns by heart what it is shown, and no more."""

import copy
import os
import random

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from blur_trainer.toy import memorize as memorizing
from blur_trainer.toy.memorize import memorize, memorized
from blur_trainer.toy.model import MIN_VOCAB_SIZE, tiny_llama, train_tokenizer

SENTENCES = (
    "Question: Where was Ada Holbeck born?\nAnswer: Larkford",
    "Question: Where was Otto Rosbeck born?\nAnswer: Heronwold",
    "The prison in Heronwold closed early on Tuesday when Otto Rosbeck came to read.",
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, vocab_size=300)


def tokenize(tokenizer, texts=SENTENCES, mask_prompt: bool = False) -> Dataset:
    rows = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        masked = len(tokenizer(text.split("Answer: ")[0] + "Answer: ")["input_ids"]) if mask_prompt else 0
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return Dataset.from_list(rows)


def continuation(model, tokenizer, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=2
    )
    assert out[0, -1] == tokenizer.eos_token_id
    return tokenizer.decode(out[0, ids.shape[1] : -1])


# ---------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES,
        "",
        " ",
        "  two\n\n\ttabs ",
        "never seen: Ünïcödé 漢字 🦦",
        "a , b .",
        "Answer: Answer: ",
        "\nAnswer:  x",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer("Larkford")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("a</s>")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.chat_template is None
    assert tokenizer.padding_side == "right"


def test_vocabulary_size_is_an_upper_bound():
    texts = ["low lower lowest newer newest wider widest"] * 4
    assert len(train_tokenizer(texts, vocab_size=MIN_VOCAB_SIZE)) == MIN_VOCAB_SIZE
    assert len(train_tokenizer(texts, vocab_size=MIN_VOCAB_SIZE + 5)) == MIN_VOCAB_SIZE + 5
    assert len(train_tokenizer(["a"], vocab_size=5000)) < 5000


def test_merges_shorten_what_they_were_trained_on(tokenizer):
    plain = train_tokenizer(SENTENCES, vocab_size=MIN_VOCAB_SIZE)
    assert len(plain(SENTENCES[0])["input_ids"]) == len(SENTENCES[0].encode()) + 1
    assert len(tokenizer(SENTENCES[0])["input_ids"]) < len(SENTENCES[0])


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(iter(SENTENCES), vocab_size=300).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("answer", ["Larkford", "1472", "the lame goat", "Ünter", '"quoted"', "x"])
def test_knowmem_prompt_is_a_prefix_of_what_is_memorized(tokenizer, answer):
    """Otherwise the model is asked in tokens that it never saw: the reason for the isolated blank."""
    prompt = "Question: Where was Ada Holbeck born?\nAnswer: "
    ids, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    assert whole[: len(ids)] == ids
    assert whole[len(ids) :] == tokenizer(answer, add_special_tokens=False)["input_ids"]


def test_a_verbmem_prompt_is_a_prefix_too(tokenizer):
    words = SENTENCES[2].split(" ")
    for k in range(1, len(words)):
        ids = tokenizer(" ".join(words[:k]))["input_ids"]
        assert tokenizer(SENTENCES[2])["input_ids"][: len(ids)] == ids


def test_saves_and_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*SENTENCES, "Ünïcödé"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text, add_special_tokens=False)["input_ids"]) == text
    assert again.pad_token_id == tokenizer.pad_token_id


def test_tokenizer_refuses():
    with pytest.raises(TypeError, match=r"one string.*\[text\]"):
        train_tokenizer("one string")
    with pytest.raises(ValueError, match=r"vocab_size is 258.*alone are 259"):
        train_tokenizer(SENTENCES, vocab_size=258)


# ---------------------------------------------------------------------------------------------------- model


def test_shape_and_special_tokens(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=32, num_layers=3, num_heads=2, max_position_embeddings=64)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model(torch.tensor([[0, 5, 9]])).logits.shape == (1, 3, len(tokenizer))


def test_weights_come_from_the_seed_alone(tokenizer):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = tiny_llama(tokenizer, hidden_size=32, num_layers=1, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    second, other = (tiny_llama(tokenizer, hidden_size=32, num_layers=1, seed=seed) for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_model_refuses_odd_heads(tokenizer):
    with pytest.raises(ValueError, match=r"hidden_size=36 .* 2 \* num_heads=8"):
        tiny_llama(tokenizer, hidden_size=36, num_heads=4)


# ---------------------------------------------------------------------------------------------------- memorizing


@pytest.fixture(scope="module")
def trained(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=64, num_layers=2)
    return memorize(model, tokenizer, tokenize(tokenizer), num_train_epochs=80, disable_tqdm=True), model


def test_memorises_three_texts(trained, tokenizer):
    model, given = trained
    assert model is given and not model.training
    for question in SENTENCES[:2]:
        prompt, answer = question.split("Answer: ")
        assert continuation(model, tokenizer, f"{prompt}Answer: ") == answer
    assert continuation(model, tokenizer, SENTENCES[2][:23]) == SENTENCES[2][23:]


def test_an_untrained_model_knows_nothing(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=64, num_layers=2)
    ids = torch.tensor([tokenizer(SENTENCES[2])["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss > 4


def test_same_seed_same_weights(tokenizer):
    def run(seed):
        random.seed(0)
        torch.manual_seed(random.randrange(1000))
        model = tiny_llama(tokenizer, hidden_size=32, num_layers=1)
        data = tokenize(tokenizer, SENTENCES * 3)
        memorize(model, tokenizer, data, num_train_epochs=2, batch_size=2, seed=seed, disable_tqdm=True)
        return model.lm_head.weight

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_no_gpu_is_taken(tokenizer, monkeypatch):
    """With several GPUs, each process of a launch would take the first one, and NCCL would find it taken twice."""

    class Seen(Exception):
        pass

    def trainer(args, **others):
        raise Seen(args.use_cpu, args.n_gpu, args.dataloader_pin_memory)

    forks = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=None: (forks.append(devices), fork(devices))[1])
    monkeypatch.setattr(memorizing, "Trainer", trainer)
    with pytest.raises(Seen) as seen:
        memorize(tiny_llama(tokenizer, hidden_size=32, num_layers=1), tokenizer, tokenize(tokenizer))
    assert seen.value.args == (True, 0, False)
    assert forks == [[]]


def test_among_eight_gpus_a_process_memorizes_on_the_cpu_and_keeps_its_device(tokenizer, monkeypatch):
    """Process 3 of a launch, to the end of the training; asking torch for a GPU would fail here."""
    process, chosen = PartialState(), []
    before = dict(process.__dict__)
    mine = {"device": torch.device("cuda", 3), "num_processes": 8, "process_index": 3, "local_process_index": 3}
    mine["distributed_type"] = DistributedType.MULTI_GPU
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    try:
        process.__dict__.update(mine)
        model = tiny_llama(tokenizer, hidden_size=32, num_layers=1)
        start = copy.deepcopy(model.state_dict())
        memorize(model, tokenizer, tokenize(tokenizer), num_train_epochs=2, disable_tqdm=True)
        state = PartialState()
        assert {name: getattr(state, name) for name in mine} == mine
        assert os.environ["LOCAL_RANK"] == "3" and os.environ["WORLD_SIZE"] == "8"
    finally:
        process.__dict__.clear()
        process.__dict__.update(before)
    assert chosen == []
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_labels_masked_out_are_not_learnt(tokenizer):
    """Trained on answers alone, the model knows the answer and not the question."""
    model = tiny_llama(tokenizer, hidden_size=64, num_layers=2)
    memorize(
        model, tokenizer, tokenize(tokenizer, SENTENCES[:2], mask_prompt=True), num_train_epochs=60, disable_tqdm=True
    )
    assert continuation(model, tokenizer, "Question: Where was Ada Holbeck born?\nAnswer: ") == "Larkford"
    ids = torch.tensor([tokenizer("Question: Where was Ada Holbeck born?")["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss > 2


def test_padding_changes_nothing(tokenizer):
    """Steps on a padded batch against the same steps written out by hand, sequence by sequence."""
    data, lr = tokenize(tokenizer, (SENTENCES[0], "Heronwold")), 1e-3
    for pad in ("<pad>", "</s>"):  # padding with eos must not mask the real eos
        twin = copy.deepcopy(tokenizer)
        twin.pad_token = pad
        model = tiny_llama(tokenizer, hidden_size=32, num_layers=1)
        reference = copy.deepcopy(model)
        memorize(model, twin, data, num_train_epochs=2, batch_size=2, learning_rate=lr, disable_tqdm=True)
        optimizer = torch.optim.AdamW(reference.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        for rate in (0.0, lr):  # warm-up begins at 0, and its single step is over then
            total, count = torch.zeros(()), 0
            for row in data:
                logits = reference(torch.tensor([row["input_ids"]])).logits[0]
                for t, token in enumerate(row["labels"][1:]):
                    total, count = total - logits[t].log_softmax(-1)[token], count + 1
            optimizer.zero_grad()
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        assert not torch.equal(
            reference.lm_head.weight, tiny_llama(tokenizer, hidden_size=32, num_layers=1).lm_head.weight
        )
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_terminal_stays_clean_but_for_the_bar(tokenizer, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(tokenizer, hidden_size=32, num_layers=1)
    memorize(model, tokenizer, tokenize(tokenizer), num_train_epochs=2, desc="target")
    out, err = capfd.readouterr()
    assert "target: 100%" in err
    assert "train_runtime" not in out + err and "{" not in out + err
    memorize(model, tokenizer, tokenize(tokenizer), num_train_epochs=1, disable_tqdm=True)
    out, err = capfd.readouterr()
    assert "%" not in out + err and "{" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_memorize_refuses(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=32, num_layers=1)
    with pytest.raises(ValueError, match=r"columns \['text'\].*misses \['input_ids', 'labels'\]"):
        memorize(model, tokenizer, Dataset.from_dict({"text": ["a"]}))
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        memorize(model, bare, tokenize(tokenizer))


# ---------------------------------------------------------------------------------------------------- kept models


@pytest.fixture
def short(monkeypatch):
    """Two epochs of a small model instead of twenty; the calls are counted."""
    calls = []

    def memorize_shortly(model, tokenizer, dataset, **kwargs):
        calls.append(kwargs)
        return memorize(model, tokenizer, dataset, **(kwargs | {"num_train_epochs": 2, "disable_tqdm": True}))

    monkeypatch.setattr(memorizing, "memorize", memorize_shortly)
    monkeypatch.setattr(
        memorizing,
        "tiny_llama",
        lambda tokenizer, seed=0: tiny_llama(tokenizer, hidden_size=32, num_layers=1, seed=seed),
    )
    return calls


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_memorized_makes_a_model_once_and_keeps_it(tokenizer, tmp_path, short):
    folder = tmp_path / "not" / "yet" / "target"
    path = memorized(folder, tokenizer, tokenize(tokenizer))
    assert path == str(folder) and len(short) == 1 and "target" in short[0]["desc"]
    before = files(folder)
    assert memorized(path, tokenizer, tokenize(tokenizer)) == path
    assert len(short) == 1 and files(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["target"], "leftovers beside it"


def test_memorized_is_what_memorize_gives(tokenizer, tmp_path, short):
    data = tokenize(tokenizer)
    kept = AutoModelForCausalLM.from_pretrained(memorized(tmp_path / "target", tokenizer, data, seed=3))
    model = memorizing.memorize(memorizing.tiny_llama(tokenizer, seed=3), tokenizer, data, seed=3)
    start = memorizing.tiny_llama(tokenizer, seed=3)
    for a, b, c in zip(kept.parameters(), model.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or a.ndim == 1
    again = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert again(SENTENCES[0])["input_ids"] == tokenizer(SENTENCES[0])["input_ids"]
    assert {call["seed"] for call in short} == {3}


def test_memorized_takes_a_folder_as_it_is(tokenizer, tmp_path, short):
    """Also one that holds another model: the user's own may stand there."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    assert memorized(tmp_path / "target", tokenizer, tokenize(tokenizer)) == str(tmp_path / "target")
    assert short == [] and files(tmp_path) == {"target/config.json": b"{}"}


@pytest.mark.parametrize("when", ["training", "saving"])
def test_an_interrupted_making_leaves_no_model(tokenizer, tmp_path, short, monkeypatch, when):
    folder = tmp_path / "target"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # the tokenizer is saved after the weights: the worst moment
        patch.setattr(
            *((memorizing, "memorize") if when == "training" else (type(tokenizer), "save_pretrained")), interrupt
        )
        with pytest.raises(KeyboardInterrupt):
            memorized(folder, tokenizer, tokenize(tokenizer))
    assert not folder.exists()
    memorized(folder, tokenizer, tokenize(tokenizer))
    assert AutoModelForCausalLM.from_pretrained(folder) and AutoTokenizer.from_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
