"""The rules of who imports whom, as the contracts in pyproject.toml hold them."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_contracts_are_kept() -> None:
    command = [Path(sysconfig.get_path("scripts"), "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout
