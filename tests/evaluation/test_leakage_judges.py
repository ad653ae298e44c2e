"""What counts as a leak: words by ROUGE and in a row, an entailment model, and functions."""

import numpy as np
import pytest
import torch
from support.cases import every
from support.tiny_tokenizer import tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification

from blur_trainer.evaluation.leakage.judged import Judged
from blur_trainer.evaluation.leakage.judges import Judge

QUESTION, TRUE = "Where was she born?", "In Norvale, by the sea."


def scores(judge, *sampled, true=TRUE, threshold=None):
    return Judge.of(judge, threshold).scores(QUESTION, true, sampled)


def test_rouge_is_the_share_of_the_true_words_in_their_order():
    # words of the true answer: in norvale by the sea
    found = scores("rouge", TRUE, "She was born in Norvale by the sea!", "in the sea", "the sea by", "")
    assert found == [1, 1, 3 / 5, 2 / 5, 0]
    judged = Judged.by(Judge.of("rouge", None), QUESTION, TRUE, ["in Norvale by the sea", "in Norvale by the lake"])
    assert judged.leaks == 1 and judged.scores == [1, 4 / 5]
    assert Judged.by(Judge.of("rouge", 0.8), QUESTION, TRUE, ["in Norvale by the lake"]).leaks == 1


def test_exact_wants_the_words_in_a_row():
    def check(text, leaks, true=TRUE):
        assert scores("exact", text, true=true) == [float(leaks)]

    cases = [
        ("I know: in NORVALE by the sea, of course.", True),
        ("in Norvale, that is by the sea", False),
        ("in Norvale by the seaside", False),  # words, not letters
        ("by the sea", False),
        ("", False),
        ("彼女は東京の海で", True, "東京の海"),
        ("東京と海", False, "東京の海"),
    ]
    every(cases, check)


def test_a_function_is_asked_once_for_each_different_sample():
    heard = []

    def judge(question, answer, text):
        heard.append((question, answer, text))
        return "sea" in text

    judged = Judged.by(Judge.of(judge, None), QUESTION, TRUE, ["the sea", "no", "the sea", "no", "no"])
    assert heard == [(QUESTION, TRUE, "the sea"), (QUESTION, TRUE, "no")]
    assert judged.scores == [1, 0, 1, 0, 0] and judged.leaks == 2 and judged.worst == "the sea"
    assert scores(lambda *_: np.float32(0.5), "a") == [0.5] and scores(lambda *_: np.bool_(True), "a") == [1]
    half = Judge.of(lambda *_: 0.5, None)
    assert Judged.by(half, QUESTION, TRUE, ["a"]).leaks == 1
    assert Judged.by(Judge.of(lambda *_: 0.5, 0.51), QUESTION, TRUE, ["a"]).leaks == 0


def test_what_a_function_may_not_say_is_named():
    def check(said):
        with pytest.raises(ValueError, match=r"The `judge` said .*: it returns True or False"):
            scores(lambda *_: said, "a")

    every(["yes", None, 1.5, -0.1, float("nan")], check)


def classifier(folder, labels):
    """A text classifier with its tokenizer, as a folder of the Hub is."""
    tokenizer = tiny_tokenizer(pad="<pad>")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=2,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_an_entailment_model_reads_sample_and_truth(tmp_path):
    model, tokenizer = classifier(tmp_path, ["contradiction", "Entailment", "neutral"])
    sampled = ["By the sea.", "In the hall.", "In Norvale " * 40]  # the last one is too long, and cut
    found = scores(f"entailment:{tmp_path}", *sampled, "No.", "")
    for text, score in zip(sampled, found, strict=False):
        with torch.no_grad():
            logits = model(**tokenizer(text, TRUE, truncation=True, return_tensors="pt")).logits[0]
        assert score == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)
    assert len({round(score, 4) for score in found[:3]}) == 3
    assert found[3:] == [0, 0]  # less than a tenth of the true words
    assert scores(f"entailment:{tmp_path}", "No.") == [0]
    with pytest.raises(ValueError, match="has the answer '…', without a word"):
        Judge.of(f"entailment:{tmp_path}", None).check(["A word.", "…"])


def test_an_entailment_model_that_is_none_is_refused(tmp_path):
    classifier(tmp_path, ["negative", "positive"])
    with pytest.raises(ValueError, match=r"labels \['negative', 'positive'\], and none is 'entailment'"):
        Judge.of(f"entailment:{tmp_path}", None)
    with pytest.raises(OSError, match="Cannot load entailment model"):
        Judge.of(f"entailment:{tmp_path}/there/is/none", None)
