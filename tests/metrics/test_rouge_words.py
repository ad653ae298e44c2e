"""ROUGE's words: the original's on Latin script, and words of every other script."""

import random
import warnings

import pytest
from rouge_score.tokenizers import DefaultTokenizer
from support.cases import every

from blur_trainer.metrics.knowmem import KnowMem
from blur_trainer.metrics.rouge_l import rouge_l_f1
from blur_trainer.metrics.rouge_l_recall import RougeLRecall, rouge_l_recall
from blur_trainer.metrics.rouge_words import UnicodeTokenizer
from blur_trainer.metrics.verbmem import VerbMem

WORDS = [
    ("Ада родилась в Ашбае", ["ада", "родилась", "в", "ашбае"]),
    ("ولدت آدا في أشباي، ٣ مرات", ["ولدت", "آدا", "في", "أشباي", "٣", "مرات"]),
    ("एडा का जन्म यहाँ हुआ।", ["एडा", "का", "जन्म", "यहाँ", "हुआ"]),
    ("Η Άντα γεννήθηκε εδώ", ["η", "άντα", "γεννήθηκε", "εδώ"]),
    ("에이다는 여기서 태어났다", ["에이다는", "여기서", "태어났다"]),
    ("阿达出生，二〇二一年", ["阿", "达", "出", "生", "二", "〇", "二", "一", "年"]),
    ("日本のデータ", ["日", "本", "の", "デ", "ー", "タ"]),
    ("วันดี", ["วั", "น", "ดี"]),
    ("בְּרֵאשִׁית בָּרָא", ["בְּרֵאשִׁית", "בָּרָא"]),
    ("می\u200cخواهم", ["میخواهم"]),
    ("iPhone在2021年АБВ", ["iphone", "在", "2021", "年", "абв"]),
    ("中Ада", ["中", "ада"]),
    ("й и\u0306", ["й", "й"]),  # composed and decomposed
    ("😀 … — ½ ™ 𝔊", []),
]


def test_words_of_many_scripts():
    tokenize = UnicodeTokenizer().tokenize
    every(WORDS, lambda text, words: pytest.fail(f"{tokenize(text)}") if tokenize(text) != words else None)


def test_text_in_latin_script_has_the_originals_words():
    """Accents, ligatures, symbols, other spaces: published numbers on such texts stay what they are."""
    rng = random.Random(0)
    latin = [chr(code) for code in (*range(0x20, 0x370), *range(0x1E00, 0x1F00), *range(0x2000, 0x2200))]
    latin.remove("\u2126")  # Ohm: its lower case is the Greek letter
    for stem in (False, True):
        ours, original = UnicodeTokenizer(stem), DefaultTokenizer(stem)
        for _ in range(300):
            text = "".join(rng.choice(latin) if rng.random() < 0.4 else rng.choice("aeglnrs inged1") for _ in range(40))
            assert ours.tokenize(text) == original.tokenize(text), repr(text)


def test_what_is_recited_word_for_word_scores_1_in_every_script():
    for text, words in WORDS:
        for score in (rouge_l_f1, rouge_l_recall):
            assert score(text, text) == (1.0 if words else 0.0)
    assert rouge_l_f1("Ада родилась", "Ада умерла") == 0.5
    assert rouge_l_recall("他在北京", "他在南京") == 0.75
    assert rouge_l_f1("Ада родилась", "Ада родилась", tokenizer="original") == 0.0
    assert rouge_l_recall("writes novels, где", "write novel где") == 1.0  # ASCII words are stemmed
    with pytest.raises(ValueError, match=r"\['unicode', 'original'\], got 'ascii'"):
        rouge_l_f1("a", "a", tokenizer="ascii")


def test_metrics_take_the_tokenizer_and_name_references_without_a_word():
    pair = {"predictions": ["Ада тут", "yes"], "references": ["Ада тут", "yes"]}
    for metric, key, whole in (
        (VerbMem, "verbmem", 100),
        (KnowMem, "knowmem", 100),
        (RougeLRecall, "rouge_l_recall", 1),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert metric(keep_in_memory=True).compute(**pair)[key] == whole
        with pytest.warns(UserWarning, match=r"1 references have no word.*'original'.*'Ада тут'"):
            assert metric(keep_in_memory=True).compute(**pair, tokenizer="original")[key] == whole / 2
