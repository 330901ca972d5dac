"""Errors reach a person as sentences."""

import gradio as gr
import pytest

from apps.sentences import sentence, spoken
from apps.stopping import Stopped


def test_paths_of_the_pages_own_are_shortened(tmp_path):
    error = ValueError(f"{tmp_path}/page-1f/0001/mug.safetensors: the key\n 'x' is not used")
    assert sentence(error, tmp_path) == "mug.safetensors: the key 'x' is not used"
    assert sentence(ValueError("drawing: no"), tmp_path) == "Drawing: no"
    assert sentence(Stopped(), tmp_path) == "Stopped."
    assert "mistake of its own (KeyError)" in sentence(KeyError("x"), tmp_path)


def test_functions_and_generators_raise_sentences_alone(tmp_path, capsys):
    def fails(number):
        raise ValueError(f"the number is <{number}>")

    def fails_later(number):
        yield number
        raise KeyError(number)

    with pytest.raises(gr.Error) as found:
        spoken(tmp_path)(fails)(3)
    assert found.value.message == "The number is &lt;3&gt;"
    assert not found.value.print_exception and capsys.readouterr().err == ""
    news = spoken(tmp_path)(fails_later)(4)
    assert next(news) == 4
    with pytest.raises(gr.Error, match="mistake of its own"):
        next(news)
    assert "KeyError: 4" in capsys.readouterr().err
