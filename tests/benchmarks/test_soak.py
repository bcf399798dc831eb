"""Twenty of the kills and signals that ``python -m tests.benchmarks.soak`` deals out by the hundred."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.soak import PROGRAMS, soak
from tests.bundles.jobs import serving


def test_runs_that_are_hit_twenty_times_end_as_if_nobody_had_disturbed_them(tmp_path: Path) -> None:
    with serving() as server:
        assert soak(server, tmp_path, count=20, seed=0, programs=list(PROGRAMS), most=10).total() == 20
