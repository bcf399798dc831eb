"""Comparisons of probes from the predictions that their runs leave; probes themselves run in the bundle's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from custom_components.evaluation.classify import compare_auroc
from custom_components.evaluation.report import write_predictions


@pytest.mark.parametrize("names", [["NA", "null", "p", "q"], ["01", "1", "1.0", "q"], ["NA", "None", "nan", "null"]])
def test_any_name_of_a_patient_is_compared(tmp_path: Path, names: list[str]) -> None:
    truth, score = np.array([[1.0], [0.0], [1.0], [0.0]]), np.array([[0.9], [0.2], [0.4], [0.6]])
    for name, patients in (("named", names), ("plain", list("abcd"))):
        items = [{"name": f"scan{i}", "patient": patient} for i, patient in enumerate(patients)]
        write_predictions(tmp_path / name / "predictions.csv", items, ["Nodule"], truth, score)
    found = compare_auroc({1.0: {name: tmp_path / name for name in ("named", "plain")}}, tmp_path / "out")["1.0"]
    assert found["named"] == found["plain"] and found["named"]["mean"] == 0.75
