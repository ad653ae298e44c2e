"""What ROUGE counts as a word: in the original package ASCII letters and digits only, here words of every script."""

import unicodedata
import warnings
from collections.abc import Iterable
from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from blur_trainer.metrics.protocols import UNICODE, check_rouge_tokenizer

# Scripts that put no spaces between words, by the names of their characters: one character is a word.
_UNSPACED = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO ", "YI "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "BALINESE ", "JAVANESE "),
)
_JOINERS = "\u200c\u200d"  # inside of words of Persian and of Indian scripts


class UnicodeTokenizer(Tokenizer):
    """
    The original's words, and those of every other script.

    Text in Latin script gives the words of `rouge_score`, accents included (é separates words there), so that published
    numbers stay what they are. Letters and digits of other scripts make words with their marks; of scripts without
    spaces (Chinese, Japanese, Thai ...) each character with its marks is a word, as in multilingual ROUGE. Only ASCII
    words are stemmed.

    Args:
        use_stemmer (`bool`, *optional*, defaults to `False`):
            Whether to stem as the original does (Porter).
    """

    def __init__(self, use_stemmer: bool = False) -> None:
        self._original = DefaultTokenizer(use_stemmer)

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return self._original.tokenize(text)
        words: list[str] = []
        latin, word, closed = "", "", False  # `closed`: the word takes marks only
        for character in text.lower() + " ":
            kind = _kind(character)
            if word and (kind in ("mark", "joiner") or (kind == "other" and not closed)):
                word += "" if kind == "joiner" else character
                continue
            if word:
                words.append(unicodedata.normalize("NFC", word))
            word, closed = "", kind == "single"
            if kind in ("other", "single"):
                words += self._original.tokenize(latin)
                latin, word = "", character
            else:
                latin += character
        return words + self._original.tokenize(latin)


@lru_cache(maxsize=100_000)
def _kind(character: str) -> str:
    """`other` and `single` make words; `mark` and `joiner` continue them; `space` is left to the original."""
    code = ord(character)
    if character in _JOINERS:
        return "joiner"
    category = unicodedata.category(character)
    if category in ("Mn", "Mc"):
        return "mark"
    # Below U+0370 letters are Latin; from U+2000 to U+2BFF, and among the mathematical ones, they are symbols.
    if code < 0x370 or 0x2000 <= code < 0x2C00 or 0x1D400 <= code < 0x1D800:
        return "space"
    name = unicodedata.name(character, "")
    if name == "IDEOGRAPHIC NUMBER ZERO":
        return "single"
    if not (category[0] == "L" or category == "Nd") or name.startswith(("LATIN ", "MODIFIER LETTER ")):
        return "space"
    return "single" if name.startswith(_UNSPACED) else "other"


@lru_cache(maxsize=4)
def rouge_scorer(tokenizer: str, use_stemmer: bool) -> RougeScorer:
    """ROUGE-L with the words of `tokenizer`, `"unicode"` or `"original"`."""
    return RougeScorer(["rougeL"], tokenizer=_tokenizer(tokenizer, use_stemmer))


@lru_cache(maxsize=4)
def _tokenizer(name: str, use_stemmer: bool) -> Tokenizer:
    return UnicodeTokenizer(use_stemmer) if check_rouge_tokenizer(name) == UNICODE else DefaultTokenizer(use_stemmer)


def warn_of_wordless(references: Iterable[str], tokenizer: str) -> None:
    """Warns of references that have characters but no word: whatever a model writes, they score 0."""
    words = _tokenizer(tokenizer, False)
    wordless = [text for text in references if text.strip() and not words.tokenize(text)]
    if wordless:
        warnings.warn(
            f"{len(wordless)} references have no word for ROUGE with tokenizer={tokenizer!r} and score 0 whatever the "
            f"model writes, the first is {wordless[0][:80]!r}.",
            stacklevel=3,
        )
