"""Nobody sees another's things, and nothing stays when a page is closed."""

import pytest

from apps.session import Sessions
from apps.shelf import Lora
from apps.words import Words

NOTHING = Words(prompt="", caption="")


def test_two_pages_have_nothing_in_common(tmp_path):
    sessions = Sessions(tmp_path)
    one, two = sessions.of("a"), sessions.of("b")
    assert one is sessions.of("a") and one is not two and one.folder != two.folder
    one.loras["mug"] = Lora("mug", one.folder, NOTHING)
    one.keep_gates(frozenset({"mug", "ink"}), one.folder)
    assert [lora.name for lora in one.chosen(["mug", "mug"], {})] == ["mug"]
    with pytest.raises(ValueError, match="There is no LoRA 'mug' on this page"):
        two.chosen(["mug"], {})
    assert one.gates_of(frozenset({"ink", "mug"})) and not two.gates_of(frozenset({"ink", "mug"}))
    one.drawing.stop()
    assert two.drawing and not one.drawing


def test_a_closed_page_leaves_no_file_even_of_work_still_running(tmp_path):
    sessions = Sessions(tmp_path)
    session = sessions.of("a")
    with session.working():
        first = session.new_path("x.png")
        first.parent.mkdir(parents=True)
        first.touch()
        sessions.close("a")
        assert not session.training and not session.drawing
        late = session.new_path("y.png")
        late.parent.mkdir(parents=True)
        late.touch()
    assert not list(tmp_path.iterdir()) and len(sessions) == 0
    sessions.close("a")
    assert sessions.of("a") is not session
