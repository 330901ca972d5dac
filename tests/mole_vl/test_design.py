"""Rules of the house, as tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["mole_vl", "dreambooth", "nlp", "pipelines", "apps"]
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ALLOWED = {
    "mole_vl": {"mole_vl"},
    "dreambooth": {"dreambooth", "mole_vl"},
    "nlp": {"nlp", "mole_vl"},
    "pipelines": {"pipelines", "dreambooth", "nlp", "mole_vl"},
    "apps": set(PACKAGES),
}


def test_the_core_needs_no_framework():
    code = (
        "import sys, mole_vl, mole_vl.training, mole_vl.losses\n"
        "bad = {'diffusers', 'transformers', 'peft', 'PIL', 'open_clip'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(bad)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0]
    ours = set(imports(path)) & set(PACKAGES)
    assert ours <= ALLOWED[room]


def test_the_core_knows_neither_pictures_nor_words():
    for path in (ROOT / "mole_vl").rglob("*.py"):
        # A library's token is the credential that opens a store, as fsspec and the Hub call it.
        meant = {"token"} if path.parent.name == "library" else set()
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        names |= {n.arg for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.arg)}
        odd = {
            name
            for name in names - meant
            if {"image", "pixel", "token", "prompt"} & set(name.split("_"))
        }
        assert not odd, (path.name, odd)
