"""What the commands are tried on: files of one's own and a tiny model beside them, made once."""

import socket

import pytest
from support.own_data import write_own_data
from transformers import AutoModelForCausalLM

from blur_trainer.cli.main import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("own")
    write_own_data(made, epochs=10)  # it need not know them well
    return made


@pytest.fixture
def nothing_loaded(monkeypatch):
    """A refusal comes before any weight is read."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.fixture
def no_request(monkeypatch):
    """The Hub may be asked, and must not be."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the Hub was asked"))


@pytest.fixture
def refused(folder, monkeypatch, capsys, nothing_loaded):
    """Runs a command that must be refused: exit code 2, nothing on stdout. Returns the last line that it said."""
    monkeypatch.chdir(folder)

    def call(*words):
        assert main(list(words)) == 2, words
        told = capsys.readouterr()
        assert told.out == "" and told.err.endswith("\n")
        last = told.err.splitlines()[-1]
        assert last.startswith(f"blur-trainer {words[0]}: ")
        return last

    return call
