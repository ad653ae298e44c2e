"""The two leaves that guard what leaves the process: names that become paths, and access tokens."""

import pytest
from support.cases import every

from blur_trainer.credentials import without_tokens
from blur_trainer.file_names import file_name


def test_a_plain_name_is_a_file_name():
    names = ["a", "forget_potions", "model-00001-of-00002.safetensors", "news v2", "東京", "a.b-c", "x" * 200, "-x"]
    assert [file_name(name, "x") for name in names] == names


def test_what_leads_elsewhere_or_breaks_a_line_is_none():
    outside = ["", ".", "..", "../a", "/a", "a/b", "a\\b", "C:a", "~/a", ".training", "a/../b"]
    broken = ["a\nb", "a\x00", "a\tb", "a\u2028b", " a", "a ", "a*", "a|b", '"a"', "\ud800", "x" * 201, "東" * 67]

    def refused(name):
        with pytest.raises(ValueError, match=r"^The topic .*(no plain file name|longer than a file may be called)"):
            file_name(name, "The topic")

    every([*outside, *broken, None, 3, b"a"], refused)


def test_tokens_are_replaced_at_any_depth_and_nothing_else():
    item = {"token": "s", "a": [{"hub_token": "s"}, ("x", {"API_KEY": "s"})], "use_auth_token": True}
    kept = {"pad_token": "<pad>", "tokens": "text", "max_new_tokens": 3, "token": None, "dtype": float}
    shown = {"token": "<TOKEN>", "a": [{"hub_token": "<HUB_TOKEN>"}, ("x", {"API_KEY": "<API_KEY>"})]}
    assert without_tokens(item) == shown | {"use_auth_token": True}
    assert without_tokens(kept) == kept and item["token"] == "s"
