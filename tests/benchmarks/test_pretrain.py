"""The pre-training benchmark through its command line, at a size that says nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_benchmark_writes_what_it_prints(tmp_path: Path) -> None:
    keys = {
        "img_size": [64, 64, 32],
        "num_layers": 1,
        "volume_decoder_layers": 1,
        "report_decoder_layers": 1,
        "top_k": 2,
    }
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.pretrain",
        "--out",
        str(out),
        "--keys",
        str(tmp_path / "keys.json"),
    ]
    command += ["--batch_sizes", "1", "--repeats", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
    found = json.loads(out.read_text())
    for precision in ("fp32", "bf16"):
        ours = found["simcrop"][precision]["1"]
        assert (
            found["time_ratio_to_monai_mae"][precision]["1"]
            == ours["seconds"] / found["monai_mae_fp32"]["1"]["seconds"]
        )
        assert 0 < found["matmul_share"][precision]["1"] < 1
        assert found["memory_ratio_to_monai_mae"][precision]["1"] > 0
        assert {"image encoder", "image decoder", "report decoder", "losses"} <= set(found["breakdown"][precision])
        assert ours["losses"]["total"] == pytest.approx(found["simcrop"]["fp32"]["1"]["losses"]["total"], rel=0.01)
    assert "bottleneck" in printed and "MaskedAutoEncoderViT" in printed
