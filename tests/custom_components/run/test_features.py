"""The feature cache: right features under keys that change with whatever would change them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from custom_components.data.read import LoadCTd
from custom_components.errors import InputError
from custom_components.probe import LinearProbe
from custom_components.run import features
from custom_components.run.features import FeatureCache, FeatureLoader, RateExport, describe
from custom_components.vit import SimCroPEncoder
from monai import transforms as mt

from tests.watch import forked, within


def network(seed: int = 0, num_heads: int = 3, frozen: bool = True) -> LinearProbe:
    torch.manual_seed(seed)
    encoder = SimCroPEncoder(
        img_size=(16, 8, 8), patch_size=(4, 4, 2), hidden_size=24, mlp_dim=32, num_layers=1, num_heads=num_heads
    )
    return LinearProbe(encoder, 2, frozen)


def chains(**changes: object) -> tuple[list, list, list]:
    keys = {"a_min": -1000, "pixdim": (2.0, 2.0, 2.0), "scale": 0.8, "offsets": 0.1, "std": 0.1, "prob": 0.5} | changes
    size = keys.get("size", (16, 8, 8))
    pad = mt.SpatialPadd("image", size, mode="reflect", reflect_type=keys.get("reflect_type", "even"))
    read = [
        LoadCTd("image"),
        mt.ScaleIntensityRanged("image", keys["a_min"], 1000, -1, 1, clip=True),
        mt.Orientationd("image", axcodes="RAS", labels=None),
        mt.Spacingd("image", keys["pixdim"], mode="bilinear", dtype="float32"),
    ]
    plain = [mt.CenterSpatialCropd("image", size), pad]
    augment = [
        mt.RandScaleCropd("image", keys["scale"], max_roi_scale=1.0),
        mt.RandSpatialCropd("image", size, random_size=False),
        pad,
        mt.RandFlipd("image", prob=keys["prob"], spatial_axis=0),
        mt.RandShiftIntensityd("image", offsets=keys["offsets"], prob=keys["prob"]),
        mt.RandGaussianNoised("image", std=keys["std"], prob=keys["prob"]),
    ]
    return read, plain, augment


@pytest.fixture
def items(tmp_path: Path) -> list[dict]:
    random = np.random.RandomState(0)
    found = []
    for i in range(3):
        volume = random.randint(-1000, 400, (20, 12, 10)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / f"scan{i}.nii.gz")
        label = np.array([i % 2, 1], np.float32)
        found.append({"image": str(tmp_path / f"scan{i}.nii.gz"), "name": f"scan{i}", "label": label})
    return found


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., FeatureCache]:
    def make(probe: LinearProbe | None = None, **options: object) -> FeatureCache:
        changes = options.pop("changes", {})
        read, plain, augment = chains(**changes)
        return FeatureCache(
            probe or network(), read, plain, augment, cache_dir=str(tmp_path / "cache"), amp=False, **options
        )

    return make


def test_features_are_the_networks(cache: Callable, items: list[dict]) -> None:
    dataset = cache().encode(items)
    read, plain, _ = chains()
    for i, item in enumerate(items):
        volume = mt.Compose(read + plain)(dict(item))["image"].as_tensor()[None]
        with torch.inference_mode():
            torch.testing.assert_close(dataset.features[i, 0], network().eval().features(volume)[0])
    assert dataset.labels.tolist() == [[0, 1], [1, 1], [0, 1]]


def test_nothing_is_encoded_twice(cache: Callable, items: list[dict]) -> None:
    first = cache()
    views = first.encode(items, num_views=3).features
    assert first.encoded == 9
    assert not torch.equal(views[:, 1], views[:, 2])  # views differ
    again = cache()
    torch.testing.assert_close(again.encode(items, num_views=3).features, views)
    assert again.encoded == 0
    more = cache()
    torch.testing.assert_close(more.encode(items[:2], num_views=4).features[:, :3], views[:2])
    assert more.encoded == 2  # the fourth view of two volumes


def test_views_follow_from_seed_name_and_number_alone(cache: Callable, items: list[dict], tmp_path: Path) -> None:
    views = cache().encode(items, num_views=3).features
    for file in tmp_path.glob("cache/*/*/scan1-*.npy"):
        file.unlink()
    again = cache(num_workers=1)
    torch.testing.assert_close(again.encode(items[1:2], num_views=3).features, views[1:2])
    assert again.encoded == 3
    other = cache(seed=7).encode(items, num_views=2).features
    torch.testing.assert_close(other[:, 0], views[:, 0])
    assert not torch.allclose(other[:, 1], views[:, 1])


@pytest.mark.parametrize(
    "changes", [{"a_min": -900}, {"pixdim": (2.0, 2.0, 2.1)}, {"size": (16, 8, 12)}, {"reflect_type": "odd"}]
)
def test_a_deterministic_transforms_argument_changes_both_keys(cache: Callable, changes: dict) -> None:
    assert {f.parent for f in cache().folders()} != {f.parent for f in cache(changes=changes).folders()}


@pytest.mark.parametrize("changes", [{"scale": 0.7}, {"offsets": 0.2}, {"std": 0.2}, {"prob": 0.6}])
def test_an_augmentations_argument_changes_the_augmented_key_alone(cache: Callable, changes: dict) -> None:
    before, after = cache().folders(), cache(changes=changes).folders()
    assert before[0] == after[0] and before[1] != after[1]


def test_the_encoder_is_part_of_the_key(cache: Callable) -> None:
    assert cache().folders() == cache().folders()
    assert cache().folders() != cache(network(seed=1)).folders()
    assert cache().encoder_key() != cache(network(num_heads=4)).encoder_key()
    assert cache().folders() != FeatureCache(network(), *chains(), cache_dir=cache().cache_dir, amp=True).folders()


def test_a_used_transform_is_described_as_a_fresh_one(items: list[dict]) -> None:
    read, plain, augment = chains()
    used = mt.Compose(read + augment + plain)
    before = json.dumps(describe(used))
    used.set_random_state(3)
    for item in items:
        used(dict(item))
    assert json.dumps(describe(used)) == before


def test_a_changed_file_is_encoded_anew(cache: Callable, items: list[dict]) -> None:
    before = cache().encode(items).features
    image = nib.load(items[0]["image"])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1] + 100, image.affine), items[0]["image"])
    again = cache()
    after = again.encode(items).features
    assert again.encoded == 1
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1:], after[1:])


def test_a_bad_volume_is_left_out_and_told_at_the_end(
    cache: Callable, items: list[dict], capsys: pytest.CaptureFixture
) -> None:
    Path(items[1]["image"]).write_bytes(b"not a volume")
    os.unlink(items[2]["image"])
    reader = cache()
    dataset = reader.encode(items)
    assert [item["name"] for item in dataset.data] == ["scan0"] and len(dataset) == 1
    assert "skipped: " in capsys.readouterr().err
    with pytest.raises(InputError, match="2 volumes.*scan"):
        reader.report()
    with pytest.raises(InputError, match="none of 1 volumes"):
        cache().encode(items[1:2])


def test_a_cut_off_feature_is_made_again(cache: Callable, items: list[dict], tmp_path: Path) -> None:
    before = cache().encode(items).features
    file = next(tmp_path.glob("cache/*/plain/scan0-*.npy"))
    file.write_bytes(file.read_bytes()[:100])
    again = cache()
    torch.testing.assert_close(again.encode(items).features, before)
    assert again.encoded == 1


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def _zeros(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:150] + bytes(32) + content[182:])


def _shorter(file: Path) -> None:
    with open(file, "wb") as stream:  # a whole file, of another width
        np.save(stream, np.ones(5, np.float32))


def _nothing(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip, _zeros, _shorter, _nothing])
def test_a_damaged_feature_is_made_again(
    cache: Callable, items: list[dict], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    before = cache().encode(items).features
    file = next(tmp_path.glob("cache/*/plain/scan0-*.npy"))
    np.testing.assert_array_equal(np.load(file), before[0, 0])  # still NumPy's format
    damage(file)
    again = cache()
    torch.testing.assert_close(again.encode(items).features, before)
    assert again.encoded == 1


def test_a_kill_loses_the_volume_in_work_alone(cache: Callable, items: list[dict]) -> None:
    killed = cache()
    real, calls = killed.network.features, []

    def features(volume: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(volume)

    killed.network.features = features
    with pytest.raises(KeyboardInterrupt):
        killed.encode(items)
    again = cache()
    again.encode(items)
    assert again.encoded == 1


def test_a_volume_that_another_process_has_is_left_to_it(
    cache: Callable, items: list[dict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = cache().encode(items).features
    shutil.rmtree(tmp_path / "cache")
    reader, writer = os.pipe()

    def encodes() -> None:
        os.close(reader)
        first = cache()
        real = first.network.features

        def slow(volume: torch.Tensor) -> torch.Tensor:
            os.write(writer, b"begun")
            time.sleep(2)
            return real(volume)

        first.network.features = slow
        first.encode(items[:1])

    pid = forked(encodes)
    os.close(writer)  # or a process that dies early would be waited for
    os.read(reader, 5)
    second = cache()
    left = second.folders()[0] / ".123.tmp.scan9-0.npy"  # of a run that was killed
    left.parent.mkdir(exist_ok=True)
    left.touch()
    features = second.encode(items).features
    assert os.waitpid(pid, 0)[1] == 0
    assert f"the first by process {pid} on" in caplog.text and not left.exists()
    assert second.encoded == 2 and torch.equal(features, expected)
    assert not list((tmp_path / "cache").rglob(".*"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_killed_process_had_in_work_is_encoded_by_another(
    cache: Callable, items: list[dict], tmp_path: Path, num_workers: int
) -> None:
    expected = cache().encode(items).features
    shutil.rmtree(tmp_path / "cache")
    reader, writer = os.pipe()

    def encodes() -> None:
        first = cache(num_workers=num_workers)

        def hangs(volume: torch.Tensor) -> torch.Tensor:
            os.write(writer, b"begun")
            time.sleep(60)

        first.network.features = hangs
        first.encode(items)

    pid = forked(encodes)
    os.read(reader, 5)
    assert list((tmp_path / "cache").rglob(".*.lock"))
    threading.Timer(1.5, os.kill, (pid, signal.SIGKILL)).start()
    second = cache()
    assert torch.equal(second.encode(items).features, expected) and second.encoded == 3
    os.waitpid(pid, 0)
    assert not list((tmp_path / "cache").rglob(".*"))


def test_processes_share_the_work(cache: Callable, items: list[dict], tmp_path: Path) -> None:
    """Three at once: no volume is encoded twice, and each has all features."""
    volumes = [{**items[i % 3], "name": f"volume{i}"} for i in range(24)]

    def encodes(number: int) -> None:
        mine = cache()
        features = mine.encode(volumes).features
        torch.save({"encoded": mine.encoded, "features": features}, tmp_path / f"{number}.pt")

    for pid in [forked(partial(encodes, number)) for number in range(3)]:
        assert os.waitpid(pid, 0)[1] == 0
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(3)]
    assert sum(each["encoded"] for each in found) == 24
    assert all(torch.equal(each["features"], found[0]["features"]) for each in found)
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_feature_that_is_lost_in_the_end_is_left_out(
    cache: Callable, items: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another run that tidies the folder, or a disk."""
    mine, missing = cache(), features._missing

    def loses(found: list[dict]) -> list[dict]:
        left = missing(found)
        for file in [] if left else tmp_path.glob("cache/*/plain/scan1-*.npy"):
            file.unlink()
        return left

    monkeypatch.setattr(features, "_missing", loses)
    dataset = mine.encode(items)
    assert "scan1" not in {item["name"] for item in dataset.data} and len(dataset.features) == len(items) - 1
    assert mine.failures == {"scan1": "scan1: its cached feature cannot be read"}


def test_what_one_process_cannot_read_all_that_train_together_leave_out(
    cache: Callable, items: list[dict], tmp_path: Path
) -> None:
    """Another process reads it all the same, as where a worker was killed or a disk was slow."""
    failed = tmp_path / "failed"

    def trains(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        mine = cache()
        whole = mine.read

        def read(item: dict) -> dict:
            if rank == 1 and item["name"] == "scan1":
                failed.touch()
                raise InputError("scan1 cannot be read")
            return whole(item)

        mine.read = read
        assert rank == 1 or within(60, failed.exists)
        dataset = mine.encode(items)
        torch.save({"names": [i["name"] for i in dataset.data], "told": mine.failures}, tmp_path / f"{rank}.pt")

    for pid in [forked(partial(trains, rank)) for rank in (0, 1)]:
        assert os.waitpid(pid, 0)[1] == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert list(tmp_path.glob("cache/*/plain/scan1-*.npy")), "by the process that could"
    assert found[0] == found[1] == {"names": ["scan0", "scan2"], "told": {"scan1": "scan1 cannot be read"}}


def test_unreadable_volumes_do_not_keep_their_claims(cache: Callable, items: list[dict], tmp_path: Path) -> None:
    Path(items[0]["image"]).write_bytes(b"not a volume")
    reader, claims = cache(), []
    real = reader.network.features

    def features(volume: torch.Tensor) -> torch.Tensor:
        claims.append(len(list((tmp_path / "cache").rglob(".*.lock"))))
        return real(volume)

    reader.network.features = features
    assert len(reader.encode(items)) == 2
    assert claims == [2, 1]


def test_bad_keys_are_told(cache: Callable, items: list[dict]) -> None:
    with pytest.raises(InputError, match="frozen"):
        cache(network(frozen=False)).encode(items)
    with pytest.raises(InputError, match="num_views"):
        cache().encode(items, 0)


def test_batches_follow_from_seed_and_epoch(cache: Callable, items: list[dict]) -> None:
    dataset = cache().encode(items, num_views=3)

    def epochs(loader: FeatureLoader, *numbers: int) -> list[torch.Tensor]:
        found = []
        for number in numbers:
            loader.sampler.set_epoch(number)
            found.append(torch.cat([batch["image"] for batch in loader]))
        return found

    one, two = epochs(FeatureLoader(dataset, 2, seed=5), 1, 2)
    assert not torch.equal(one, two)
    assert torch.equal(epochs(FeatureLoader(dataset, 2, seed=5), 2)[0], two)
    resumed = FeatureLoader(dataset, 2, seed=5)
    resumed.start = 1
    assert torch.equal(epochs(resumed, 2)[0], two[2:])
    every = {tuple(view.tolist()) for volume in dataset.features for view in volume}
    assert {tuple(row.tolist()) for row in one} <= every


def test_features_for_rate_are_those_of_the_cache(cache: Callable, items: list[dict], tmp_path: Path) -> None:
    """As rate_eval's SimpleCheckpointManager and EmbeddingEvaluator read them."""
    features, folder = cache(), tmp_path / "rate"
    data = {"train": items[:2], "test": items[2:]}
    for _ in range(2):  # the second writes over the first, and encodes nothing
        RateExport(features, data, folder, ["nodule", "effusion"], dataset_name="mine")()
        assert features.encoded == 3
    rows = pd.read_csv(folder / "processed.csv")
    assert list(rows) == ["accession", "model_name", "dataset_name", "split", "timestamp"]
    assert rows["accession"].tolist() == ["scan0", "scan1", "scan2"] and rows["split"].tolist() == ["train"] * 2 + [
        "test"
    ]
    encoded = features.plain_views(items).features[:, 0]
    labels = json.loads((folder / "labels.json").read_text())
    for i, split in enumerate(("train", "train", "test")):
        with np.load(folder / "embeddings" / split / f"scan{i}.npz") as content:
            assert content.files == ["embedding"] and content["embedding"].dtype == np.float32
            assert np.array_equal(content["embedding"], encoded[i].numpy())
        (answers,) = labels[f"scan{i}"]["qa_results"].values()
        assert answers == [{"nodule": "Yes" if i % 2 else "No"}, {"effusion": "Yes"}]


def test_features_for_rate_keep_what_could_be_read(cache: Callable, items: list[dict], tmp_path: Path) -> None:
    Path(items[1]["image"]).write_bytes(b"")
    codes = [{**item, "label": 2 - i} for i, item in enumerate(items)]
    with pytest.raises(InputError, match="scan1.*all else is done"):
        RateExport(cache(), {"train": codes}, tmp_path / "rate", ["a", "b", "c"], exclusive=True)()
    assert {path.stem for path in (tmp_path / "rate/embeddings/train").iterdir()} == {"scan0", "scan2"}
    labels = json.loads((tmp_path / "rate" / "labels.json").read_text())
    assert [answer for entry in labels["scan0"]["qa_results"]["findings"] for answer in entry.values()] == [
        "No",
        "No",
        "Yes",
    ]


def test_embeddings_of_others_are_not_mixed_with_these(cache: Callable, items: list[dict], tmp_path: Path) -> None:
    (tmp_path / "rate/embeddings/train").mkdir(parents=True)
    (tmp_path / "rate/embeddings/train/other.npz").touch()
    with pytest.raises(InputError, match="other.*give another rate_dir"):
        RateExport(cache(), {"train": items}, tmp_path / "rate", ["a", "b"])()
    with pytest.raises(InputError, match="test has two volumes named scan0"):
        RateExport(cache(), {"test": [items[0], {**items[1], "name": "b/scan0"}]}, tmp_path / "rate", ["a", "b"])()
