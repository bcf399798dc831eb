"""Weight decay, progress, and the steps of the optimiser."""

from __future__ import annotations

import math

import pytest
import torch
from custom_components.errors import InputError
from custom_components.losses import MaskedReportLoss, MaskedVolumeLoss, SimCroPLoss, SimilarityAlignmentLoss
from custom_components.run.handlers import HeldOutLoss, LossParts, TrainingProgress, decay_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from torch import nn

from tests.custom_components.run.test_resume import make_trainer


def test_weight_decay_spares_biases_norms_and_tokens_and_groups_hold_all_that_trains(network):
    model = network()
    decay, no_decay = decay_groups(model, 0.05)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    name_of = {p: name for name, p in model.named_parameters()}
    decayed, spared = ({name_of[p] for p in group["params"]} for group in (decay, no_decay))
    assert len(decayed) + len(spared) == len(decay["params"]) + len(no_decay["params"])
    assert decayed | spared == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not decayed & spared
    assert not any(name.startswith("text_encoder") for name in decayed | spared)
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name in decayed | spared:
        small = name.endswith("bias") or "cls_token" in name or "mask_token" in name or name in norms
        assert (name in spared) == small, name


def test_some_parameters_have_a_learning_rate_of_their_own(network):
    model = network()
    groups = decay_groups(model, 0.05, {"encoder.blocks": 0.1, "encoder.": 0.2})
    rate = {p: group.get("lr") for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            wanted = 0.1 if name.startswith("encoder.blocks") else 0.2 if name.startswith("encoder.") else None
            assert rate[p] == wanted, name
    torch.optim.AdamW(groups, lr=0.3)  # refuses a parameter in two groups
    with pytest.raises(InputError, match="'encoder.block_', and no parameter"):
        decay_groups(model, 0.05, {"encoder.block_": 0.1})


class Volume(nn.Module):
    """Predicts the image times a weight of 1, where zeros are true."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"volume_pred": self.weight * image, "volume_target": torch.zeros_like(image)}


def test_progress_shows_epoch_steps_and_each_loss_without_a_second_look_at_the_batch(capsys):
    weights = {"volume": 3, "alignment": 0, "report": 0}
    loss = SimCroPLoss(weights, MaskedVolumeLoss(), SimilarityAlignmentLoss(), MaskedReportLoss())
    seen, network = [], Volume()
    loss.volume.register_forward_pre_hook(lambda module, args: seen.append(args))
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.tensor([value]), "label": torch.zeros(1)} for value in (1.0, 2.0)],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=loss,
        train_handlers=[LossParts(loss), TrainingProgress()],
        decollate=False,
    )
    trainer.run()
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown and "100%" in shown and "loss 12 volume 4" in shown
    assert trainer.state.output["losses"] == {"volume": 4.0}  # a part without weight is not called
    assert not trainer.state.output["losses"]["volume"].requires_grad and len(seen) == 2


def test_held_out_losses_are_means_over_batches_in_eval_mode(caplog):
    weights = {"volume": 3, "alignment": 0, "report": 0}
    loss = SimCroPLoss(weights, MaskedVolumeLoss(), SimilarityAlignmentLoss(), MaskedReportLoss())
    network, modes = Volume(), []
    network.register_forward_pre_hook(lambda module, args: modes.append((module.training, torch.is_grad_enabled())))
    batches = [{"image": torch.tensor([value]), "label": torch.zeros(1)} for value in (1.0, 2.0)]
    parts = LossParts(loss)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=batches[:1],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=loss,
        train_handlers=[parts, HeldOutLoss(batches, parts, interval=2)],
        decollate=False,
    )
    with caplog.at_level("INFO"):
        trainer.run()
    assert modes == [(True, True), (True, True), (False, False), (False, False), (True, True)]
    assert trainer.state.metrics == {"held_out/total": 7.5, "held_out/volume": 2.5}
    assert "epoch 2, held out: total 7.500, volume 2.500" in caplog.text
    assert trainer.state.output["losses"] == {"volume": 1.0}


@pytest.mark.parametrize(("columns", "shown"), [(80, "rep 10.3"), (120, "report 10.3")])
def test_progress_fits_the_terminal(columns, shown, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    losses = {"volume": 0.698, "alignment": 2.107, "report": 10.342, "instance": 1.656}
    losses = {name: torch.tensor(value) for name, value in losses.items()}
    engine = Engine(lambda *_: {"loss": torch.tensor(4.624), "losses": losses})
    TrainingProgress().attach(engine)
    engine.network, engine.state.device = nn.Linear(1, 1), torch.device("cpu")
    engine.run([1.0], max_epochs=20)
    last = capsys.readouterr().err.split("\r")[-1].strip()
    assert shown in last and "ins" in last and "<" in last and len(last) <= columns


def test_a_training_that_ends_early_shows_where(capsys):
    def step(engine, _):
        if engine.state.iteration == 7:
            engine.terminate()
        return {"loss": torch.tensor(1.0)}

    engine = Engine(step)
    TrainingProgress().attach(engine)
    engine.network, engine.state.device = nn.Linear(1, 1), torch.device("cpu")
    engine.run([1.0], max_epochs=20)
    assert "epoch 7/20" in capsys.readouterr().err.split("\r")[-1]


def test_progress_reads_losses_only_when_it_shows_them():
    """Reading waits for the device: the first and the last of five, here, since less than ten seconds pass."""
    read = []

    class Loss(torch.Tensor):
        def item(self):
            read.append(super().item())
            return read[-1]

    engine = Engine(lambda _, value: {"loss": torch.tensor(value).as_subclass(Loss)})
    engine.network, engine.state.device = nn.Linear(1, 1), torch.device("cpu")
    TrainingProgress().attach(engine)
    engine.run([1.0, 2.0, 3.0, 4.0, 5.0], max_epochs=1)
    assert read == [1.0, 5.0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_the_schedule_steps_as_often_as_the_optimiser(tmp_path_factory, items, batch_size, accumulation):
    folder = tmp_path_factory.mktemp("schedule")
    trainer = make_trainer(
        folder, items=items, batch_size=batch_size, accumulation=accumulation, minutes=None, interval=99
    )
    steps, rates = [], []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.state.iteration))
    trainer.optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    trainer.run()
    per_epoch = math.ceil(math.ceil(items / batch_size) / accumulation)
    assert len(steps) == 2 * per_epoch
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 2) / 8)) for step in range(2, len(steps))]
    assert rates == pytest.approx([0.05 * factor for factor in [0, 0.5][: len(steps)] + cosine])
