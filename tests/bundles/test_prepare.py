"""prepare.json through the real command line: from CT-RATE as published to a folder that training reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from monai.bundle import ConfigParser

from custom_components.datalists import ct_rate
from custom_components.phantom import cohort
from custom_components.prepare import prepare
from custom_components.sources import Source
from custom_components.transforms import LoadCTd

BUNDLES = Path(__file__).parents[2] / "bundles"


def test_ct_rate_as_published_becomes_what_training_reads(tmp_path: Path) -> None:
    cohort(tmp_path / "raw", 3, 1, num_workers=1)
    damaged = tmp_path / "raw/dataset/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    keys = {"dataset_dir": tmp_path / "raw", "prepared_dir": tmp_path / "out", "pixdim": [5, 5, 10], "num_workers": 1}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/prepare.json"]
    command += [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    result = subprocess.run(command, cwd=BUNDLES / "pretrain", capture_output=True, text=True, timeout=300)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 1 and "1 of 4 volumes failed" in errors[0] and str(damaged) in errors[0]
    assert "failed=1" in result.stderr and "3 prepared, 1 failed" in (tmp_path / "out" / "summary.md").read_text()
    assert len(pd.read_csv(tmp_path / "out" / "manifest.csv")) == 4

    items = ct_rate(tmp_path / "out", exclude=tmp_path / "out" / "failed.csv")
    assert [item["name"] for item in items] == ["train_1_a_1", "train_3_a_1"]
    assert all(item["findings"] is not None and "abnormalities" in item for item in items)
    volume = LoadCTd("image")(items[0])["image"]
    assert volume.pixdim.tolist() == pytest.approx([10, 5, 5]) and -1000 <= volume.min() <= volume.max() <= 1000


@pytest.mark.parametrize(
    "bundle, overlay",
    [(path.parts[-3], path.name) for path in sorted(BUNDLES.glob("*/configs/prepare*.json"))],
)
def test_each_config_resolves_to_its_data_set(bundle: str, overlay: str, tmp_path: Path) -> None:
    folder = BUNDLES / bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(folder / name) for name in dict.fromkeys(("prepare.json", overlay))])
    parser["dataset_dir"] = str(tmp_path)
    assert isinstance(parser.get_parsed_content("source"), Source)
    (call,) = parser["run"]
    assert set(call) - {"_target_"} == set(prepare.__annotations__) - {"return"}
    if overlay == "prepare.json":  # one recipe: only the defaults of the data set may differ between bundles
        common = {k: v for k, v in json.loads((folder / overlay).read_text()).items()}
        other = json.loads((BUNDLES / "pretrain" / "configs" / overlay).read_text())
        differs = {key for key in common if common[key] != other[key]}
        assert differs <= {"dataset_dir", "source", "pixdim"} and set(common) == set(other)
