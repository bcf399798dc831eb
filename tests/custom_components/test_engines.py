"""Engine parts: errors in one line, autocast, weight decay, progress, resuming, and bad items passed over."""

from __future__ import annotations

import subprocess
import sys
import traceback

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, Lambdad
from torch import nn

from custom_components.engines import (
    AutocastInferer,
    Checkpointer,
    OneLineErrors,
    ReadableLoader,
    SentenceSimilarityInferer,
    TrainingProgress,
    decay_groups,
)
from custom_components.errors import InputError
from custom_components.losses import MaskedReportLoss, MaskedVolumeLoss, SimCroPLoss, SimilarityAlignmentLoss
from custom_components.simcrop import Aligner, VolumeEmbedder
from custom_components.text import load_text_encoder
from custom_components.vit import SimCroPEncoder

# errors in one line

TOLD = "a.nii.gz is empty (0.5 x 0.5): export it again"


def bad(*_) -> None:
    raise InputError(TOLD)


def bug(*_) -> None:
    raise KeyError("a bug")


def nested() -> None:
    try:
        try:
            bad()
        except InputError as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError as error:
        raise RuntimeError("engine run is terminating") from error


class Scans(torch.utils.data.Dataset):
    """Fails as it is read, without MONAI's RuntimeError around it."""

    def __init__(self, read) -> None:
        self.read = read

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return self.read()


def load(dataset) -> None:
    list(DataLoader(dataset, num_workers=1))


def told(case, monkeypatch, capsys) -> str:
    """What is printed for the exception that ``case`` raises."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # so that it comes back
    OneLineErrors()
    try:
        case()
    except Exception as error:
        capsys.readouterr()
        sys.excepthook(type(error), error, error.__traceback__)
        traceback.clear_frames(error.__traceback__)  # else the garbage collector waits 5 s for each loader's worker
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    [
        bad,
        nested,
        lambda: Dataset([{"image": 1}], Lambdad("image", bad))[0],
        lambda: load(Dataset([{"image": 1}], Lambdad("image", bad))),
        lambda: load(Scans(bad)),
    ],
    ids=["plain", "nested", "transform", "transform in a worker", "data set in a worker"],
)
def test_input_errors_are_told_in_one_line(case, monkeypatch, capsys):
    assert told(case, monkeypatch, capsys) == f"error: {TOLD}\n"


@pytest.mark.parametrize("case", [bug, lambda: load(Scans(bug))], ids=["plain", "in a worker"])
def test_bugs_keep_their_traceback(case, monkeypatch, capsys):
    shown = told(case, monkeypatch, capsys)
    assert shown.startswith("Traceback") and "a bug" in shown and "in bug" in shown


UNCAUGHT = """
import os, sys
from custom_components.engines import OneLineErrors
from custom_components.errors import InputError
for name, error in {"bad": InputError("told"), "bug": KeyError("a bug")}.items():
    if os.fork() == 0:  # a process each, forked, since the imports take seconds
        sys.stderr = open(name, "w")
        OneLineErrors()
        raise RuntimeError("engine run is terminating") from error
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_process_that_ends_in_an_input_error_has_exit_code_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", UNCAUGHT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "bad 1\nbug 1\n", done.stderr
    assert (tmp_path / "bad").read_text() == "error: told\n"
    assert (tmp_path / "bug").read_text().startswith("KeyError: 'a bug'\n\nThe above exception was the direct cause")


# forward and optimizer


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast_inferer_runs_the_network_in_bfloat16_if_asked(amp, dtype):
    network = nn.Linear(4, 2)
    output = AutocastInferer(amp)(torch.ones(3, 4), network)
    assert output.dtype == dtype and network.weight.dtype == torch.float32
    torch.testing.assert_close(output.float(), network(torch.ones(3, 4)), atol=0.02, rtol=0.02)


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


# progress


def run_with_losses(*values: float) -> None:
    loss = SimCroPLoss(
        {"volume": 1, "alignment": 0, "report": 0}, MaskedVolumeLoss(), SimilarityAlignmentLoss(), MaskedReportLoss()
    )
    engine = Engine(lambda _, value: loss({"volume_pred": torch.tensor([value]), "volume_target": torch.zeros(1)}))
    TrainingProgress(loss).attach(engine)
    engine.run(values, max_epochs=1)


def test_progress_shows_epoch_steps_and_each_loss(capsys):
    run_with_losses(1.0, 2.0)
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown and "2/2" in shown and "volume=4.000" in shown


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_training_stops_at_a_loss_that_is_not_finite(bad):
    with pytest.raises(InputError, match="no longer finite at iteration 2 .*'volume'"):
        run_with_losses(1.0, bad, 1.0)


# resuming


def make_trainer(folder, max_epochs, resume=None, width=4, interval=1):
    """A network with dropout on shuffled data: batch order and masks both come from torch's generator."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=4, t_total=20)
    generator = torch.Generator().manual_seed(1)
    items = [{"image": torch.randn(3, generator=generator), "label": torch.ones(1) * i} for i in range(10)]
    checkpointer = Checkpointer(
        str(folder / "checkpoint.pt"),
        {"network": network, "optimizer": optimizer, "lr_scheduler": scheduler},
        {str(folder / "encoder.pt"): network[0]},
        interval,
        resume,
    )
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        train_data_loader=DataLoader(Dataset(items), batch_size=2, shuffle=True),
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=[LrScheduleHandler(scheduler, print_lr=False, epoch_level=False), checkpointer],
        decollate=False,
    )
    return trainer, network, scheduler


def test_a_resumed_training_continues_exactly(tmp_path):
    straight, expected, expected_schedule = make_trainer(tmp_path / "straight", 4)
    straight.run()
    make_trainer(tmp_path / "first", 2)[0].run()
    trainer, network, schedule = make_trainer(tmp_path / "second", 4, resume=str(tmp_path / "first/checkpoint.pt"))
    assert trainer.state.epoch == 2 and trainer.state.max_epochs == 4
    trainer.run()
    assert trainer.state.epoch == 4 and trainer.state.iteration == straight.state.iteration == 20
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), atol=0, rtol=0)
    assert schedule.get_last_lr() == expected_schedule.get_last_lr()
    # and it was worth saving all of it: from the first epochs' weights alone it goes elsewhere
    trainer, network, _ = make_trainer(tmp_path / "third", 2)
    network.load_state_dict(torch.load(tmp_path / "first/checkpoint.pt", weights_only=True)["network"])
    trainer.run()
    assert not torch.equal(network[0].weight, expected[0].weight)


def test_checkpoints_hold_all_of_the_state_and_plain_weights_beside_it(tmp_path):
    trainer, network, _ = make_trainer(tmp_path, 1)
    trainer.run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(content) == {"network", "optimizer", "lr_scheduler", "trainer", "rng"}
    torch.testing.assert_close(torch.load(tmp_path / "encoder.pt", weights_only=True), network[0].state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "encoder.pt"]


def test_interval_spaces_the_checkpoints_and_the_last_epoch_always_writes_one(tmp_path):
    trainer, _, _ = make_trainer(tmp_path, 3, interval=2)
    saved = []
    path = tmp_path / "checkpoint.pt"

    def look(engine):
        saved.append(torch.load(path, weights_only=True)["trainer"]["iteration"] if path.exists() else None)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
    trainer.run()
    look(trainer)
    assert saved == [None, 10, 10, 15]


def test_what_cannot_be_resumed_is_told(tmp_path):
    make_trainer(tmp_path, 2)[0].run()
    path = str(tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=r"has 2 epochs already; raise max_epochs \(2\)"):
        make_trainer(tmp_path, 2, resume=path)
    with pytest.raises(InputError, match="its network does not fit the config"):
        make_trainer(tmp_path, 4, resume=path, width=5)
    with pytest.raises(InputError, match="encoder.pt: not a checkpoint to resume from, it lacks lr_scheduler, network"):
        make_trainer(tmp_path, 4, resume=str(tmp_path / "encoder.pt"))
    with pytest.raises(InputError, match="no such checkpoint"):
        make_trainer(tmp_path, 4, resume=str(tmp_path / "nothing.pt"))
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(InputError, match="tensor.pt: not a checkpoint to resume from"):
        make_trainer(tmp_path, 4, resume=str(tmp_path / "tensor.pt"))


# reading


def read(value: int) -> torch.Tensor:
    if value < 0:
        raise InputError(f"scan {value} is empty: export it again")
    return torch.full((1, 2, 2, 2), 12 / value)  # 0 is a bug of ours, not of the scan


def scans(*values: int, **keys) -> ReadableLoader:
    items = [{"name": f"scan{value}", "image": value} for value in values]
    return ReadableLoader(Dataset(items, Compose([Lambdad("image", read)])), **keys)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_scans_that_cannot_be_read_are_passed_over_and_reported(num_workers, capsys):
    loader = scans(3, -1, 4, -2, num_workers=num_workers)
    for _ in range(2):  # a second pass starts a new report
        batches = list(loader)
        assert [batch["image"][0, 0, 0, 0, 0].item() for batch in batches] == [4.0, 3.0]
        assert all(batch["image"].shape == (1, 1, 2, 2, 2) for batch in batches)
        assert loader.failures == [(f"scan-{n}", f"scan -{n} is empty: export it again") for n in (1, 2)]
    assert "skipped: scan -1 is empty: export it again" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"2 of 4 scans could not be read \(scan-1, scan-2\)"):
        loader.report()


def test_nothing_is_reported_if_all_can_be_read():
    loader = scans(1, 2)
    assert len(list(loader)) == 2
    loader.report()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_is_no_unreadable_scan(num_workers):
    with pytest.raises(RuntimeError, match="applying transform") as raised:
        list(scans(1, 0, num_workers=num_workers))
    traceback.clear_frames(raised.tb)


# sentences over volumes


def test_sentence_maps_show_the_cosine_of_each_patch(minilm, tokenizer):
    torch.manual_seed(0)
    encoder = SimCroPEncoder(
        img_size=(6, 9, 6), patch_size=(3, 3, 3), hidden_size=24, mlp_dim=32, num_layers=1, num_heads=3
    )
    network = VolumeEmbedder(encoder, Aligner(24, 384, 16)).eval()
    text_encoder, sentences = load_text_encoder(minilm), ["No effusion.", "A 3 mm nodule in the left lung."]
    volume = torch.rand(2, 1, 6, 9, 6)
    with torch.no_grad():
        output = SentenceSimilarityInferer(sentences, text_encoder, tokenizer)(volume, network)
        tokens = encoder(volume)[0][:, 1:]
    assert output["similarity"].shape == (2, 2, 6, 9, 6)
    torch.testing.assert_close(output["embedding"], network(volume))
    for s, sentence in enumerate(sentences):
        words = text_encoder(torch.tensor(tokenizer(sentence)["input_ids"])[None])[0, 1:-1]
        feature = network.aligner.sentence_projection(words).mean(0)
        for b in range(2):
            expected = nn.functional.cosine_similarity(network.aligner.patch_projection(tokens[b]), feature[None])
            # the middle voxel of each 3 x 3 x 3 patch keeps the patch's value
            middle = output["similarity"][b, s, 1::3, 1::3, 1::3]
            torch.testing.assert_close(middle.flatten(), expected, atol=1e-5, rtol=1e-4)
