"""What docs/library.md shows runs as it stands."""

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)


@pytest.fixture
def stores(request, monkeypatch):
    """Lets a block's addresses lead to this machine's stand-ins."""

    def stand_in(block):
        if "hf://" in block:
            hub = request.getfixturevalue("hub")
            hub.token = "<your_hf_token>"
            monkeypatch.setattr(constants, "ENDPOINT", hub.address)
            template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        if "az://" in block:
            monkeypatch.setenv("AZURE_TOKEN", request.getfixturevalue("azure")["token"])
        if "s3://" in block:
            options = request.getfixturevalue("s3")["options"]
            monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ann")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ann")

    return stand_in


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_examples_run_and_say_what_they_claim(number, stores, tmp_path, monkeypatch, capsys):
    block = BLOCKS[number]
    stores(block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worlds").symlink_to(ROOT / "worlds")
    exec(compile(block, f"docs/library.md, example {number}", "exec"), {})
    said = capsys.readouterr().out
    claims = re.findall(r"print\([^\n]*\)  # (.*)", block)
    assert said
    for claim in claims:
        parts = [part.strip() for part in claim.split("...") if part.strip()]
        plain = "no weights" in claim or "every file" in claim
        assert plain or all(part in said for part in parts)


def test_all_samples_of_the_other_library_have_a_counterpart():
    text = "\n".join(BLOCKS)
    for needed in ["hf://", "az://", "local://", "virtual://", "destination=", "create=True"]:
        assert needed in text
    for method in [".add(", ".get(", ".remove(", ".clone("]:
        assert method in text
