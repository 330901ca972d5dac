"""Packages of the npm registry as data: the worlds' drawings and word lists come from there."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path


def fetch(folder: Path, packages: Mapping[str, str]) -> None:
    """Install those of `packages` (name: version) that `folder` lacks; no script of theirs runs.

    Raises:
        FileNotFoundError: npm is not installed.
        subprocess.CalledProcessError: npm failed; it has said why.
    """
    missing = [f"{name}@{v}" for name, v in packages.items() if _version(folder, name) != v]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save"]
        command = ["npm", "install", "--prefix", str(folder), *flags]
        # All of them: with `--no-save` npm removes what it is not told of.
        subprocess.run([*command, *(f"{n}@{v}" for n, v in packages.items())], check=True)


def package(folder: Path, name: str) -> Path:
    """Where the files of an installed package lie."""
    return folder / "node_modules" / name


def _version(folder: Path, name: str) -> str | None:
    manifest = package(folder, name) / "package.json"
    return json.loads(manifest.read_text())["version"] if manifest.exists() else None
