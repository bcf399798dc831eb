"""Figures of the grounding evaluation by hand; the whole of it runs in ``tests/bundles/test_grounding.py``."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from custom_components.evaluation.grounding import GroundingEvaluation, peaks_of


def summary(table: pd.DataFrame) -> dict:
    return GroundingEvaluation._summary(SimpleNamespace(num_resamples=200, seed=0), table)


def test_figures_by_hand():
    table = pd.DataFrame(
        {
            "patient": ["p", "p", "q"],
            "instances": [2, 1, 3],
            "dice_simcrop": [0.5, 0.05, 0.2],
            "dice_shuffled": [0.1, 0.05, np.nan],  # the volume it was shuffled to could not be read
            "dice_oracle": [0.8, 0.1, 0.6],
            "found_simcrop": [1, 0, 2],
            "predicted_simcrop": [4, 0, 2],
            "pointing_simcrop": [1.0, 0.0, 1.0],
            "pointing_shuffled": [0.25, 0.5, 0.0],
        }
    )
    found = summary(table)
    value = {name: found[name]["simcrop"]["value"] for name in found if name != "sentences"}
    assert found["sentences"] == 3 and value["dice"] == pytest.approx(0.25)
    assert value["dice_of_oracle"] == pytest.approx(0.75 / 1.5) and value["hit_rate"] == pytest.approx(2 / 3)
    assert value["precision"] == pytest.approx(3 / 6) and value["recall"] == pytest.approx(3 / 6)
    assert value["f1"] == pytest.approx(2 * 3 / (6 + 6))
    assert found["dice"]["shuffled"]["value"] == pytest.approx(0.075)
    assert found["dice"]["minus_shuffled"]["value"] == pytest.approx(0.2)  # of those that have both
    assert found["pointing"]["minus_shuffled"]["value"] == pytest.approx((0.75 - 0.5 + 1) / 3)
    assert found["pointing"]["random_encoder"] == {"value": None, "low": None, "high": None}
    low, high = found["pointing"]["simcrop"]["low"], found["pointing"]["simcrop"]["high"]
    assert (low, high) == (0.5, 1.0)  # both sentences of p, or those of q alone: patients are drawn, not sentences


def test_masks_that_are_partial_have_no_precision():
    table = pd.DataFrame({"patient": ["p"], "instances": [2], "found_simcrop": [1], "predicted_simcrop": [np.nan]})
    found = summary(table)
    assert found["recall"]["simcrop"]["value"] == 0.5
    assert found["precision"]["simcrop"]["value"] is None and found["f1"]["simcrop"]["value"] is None


def test_the_prior_knows_nothing_of_the_patient():
    masks = {"p": (torch.tensor([0.0, 4.0]), 2), "q": (torch.tensor([1.0, 0.0]), 1), "r": (torch.tensor([2.0, 1.0]), 2)}
    told = SimpleNamespace(covered={"nodule": masks})
    assert GroundingEvaluation._prior(told, "nodule", "p").tolist() == pytest.approx([1.0, 1 / 3])
    assert GroundingEvaluation._prior(told, "nodule", "nobody").tolist() == pytest.approx([3 / 5, 1.0])
    assert GroundingEvaluation._prior(SimpleNamespace(covered={"nodule": {"p": masks["p"]}}), "nodule", "p") is None


def test_peaks_lie_within_the_scan():
    maps = torch.tensor([[[0.1, 0.9], [0.5, 0.2]], [[0.7, 0.9], [0.5, 0.2]]])
    assert peaks_of(maps, torch.tensor([True, False, True, True])).tolist() == [2, 0]
