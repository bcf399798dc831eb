"""Reading CT volumes: geometry judged by what a real chest CT shows, and every way in which a file can be bad."""

from __future__ import annotations

import gzip
import importlib.util
import logging
import os
import tracemalloc
from pathlib import Path

import itk
import nibabel as nib
import nrrd
import numpy as np
import pytest
import torch
from custom_components.data.read import LoadCTd, LoadLabeld
from custom_components.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Invertd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)

from tests.conftest import write_dicom

SLICERIO = importlib.util.find_spec("slicerio")
needs_real_ct = pytest.mark.skipif(SLICERIO is None, reason="needs the chest CT of slicerio")
RIGHT_LUNG, LEFT_LUNG = 5, 6


def real_ct() -> tuple[Path, Path]:
    """Paths of a chest CT (128 x 128 x 34 voxels, 3.05 x 3.05 x 10 mm) and of its organ labels on the same grid."""
    folder = Path(SLICERIO.origin).parent / "data"
    return folder / "CTChest4.nrrd", folder / "Segmentation.seg.nrrd"


def ras(path: Path) -> MetaTensor:
    return Orientationd("image", axcodes="RAS", labels=None)(LoadCTd("image")({"image": path}))["image"]


def phantom(shape=(20, 16, 12)) -> np.ndarray:
    """Noise around air and tissue, int16 [X, Y, Z] in HU."""
    volume = np.random.default_rng(0).normal(-900, 30, shape)
    volume[4:-4] += 950
    return volume.astype(np.int16)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([-2, -2, 2.5, 1]) if affine is None else affine), path)
    return path


def write_itk(path: Path, array: np.ndarray, **arguments) -> Path:
    image = itk.image_from_array(np.ascontiguousarray(array))
    image.SetSpacing([2.0] * array.ndim)
    itk.imwrite(image, str(path), **arguments)
    return path


def refusal(path: Path, **arguments) -> str:
    """The message with which LoadCTd refuses a file: one line that names it."""
    with pytest.raises(InputError) as error:
        LoadCTd("image", **arguments)({"image": path})
    message = str(error.value)
    assert type(error.value) is InputError, "or OneLineErrors does not know it in a data loader's text"
    assert "\n" not in message and message.count(str(path)) == 1 and len(message) < 400, message
    return message


@needs_real_ct
def test_right_is_right_and_lungs_are_air():
    ct_path, labels_path = real_ct()
    image = ras(ct_path)
    assert isinstance(image, MetaTensor) and image.shape == (1, 128, 128, 34) and image.dtype == torch.float32
    np.testing.assert_allclose(image.pixdim, (3.047, 3.047, 10), atol=1e-3)
    hu = image[0].numpy()

    # By the labels: both files have the direction (-1, -1, 1) in LPS, which is RAS, so indices mean the same in both.
    segmentation = itk.imread(str(labels_path))
    np.testing.assert_allclose(itk.array_from_matrix(segmentation.GetDirection()), np.diag([-1, -1, 1]))
    labels = itk.array_from_image(segmentation).T
    right, left = np.argwhere(labels == RIGHT_LUNG).mean(0), np.argwhere(labels == LEFT_LUNG).mean(0)
    assert right[0] > left[0] + 20
    for lung in (RIGHT_LUNG, LEFT_LUNG):
        assert -900 < np.median(hu[labels == lung]) < -700

    # By anatomy alone: the spine lies behind, the lungs above, and the liver fills the right side below them.
    bone, body = np.argwhere(hu[40:88] > 300).mean(0), np.argwhere(hu[40:88] > -200).mean(0)
    assert bone[1] < body[1] - 5
    soft_tissue = (hu > 0) & (hu < 150)
    assert soft_tissue[..., :10].sum() > 2 * soft_tissue[..., -10:].sum()
    assert soft_tissue[64:, :, :10].sum() > 1.15 * soft_tissue[:64, :, :10].sum()


@needs_real_ct
@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nii", "ct.mha", "ct.mhd", "ct.nhdr", "ct.NRRD", "dicom"])
def test_every_format_gives_the_same_volume(tmp_path, name):
    ct_path, _ = real_ct()
    image = itk.imread(str(ct_path), itk.SS)
    if name == "dicom":
        write_dicom(image, tmp_path / name)
    else:
        itk.imwrite(image, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).rename(tmp_path / name)
    expected, found = ras(ct_path), ras(tmp_path / name)
    torch.testing.assert_close(found.as_tensor().float(), expected.as_tensor(), rtol=0, atol=0)
    torch.testing.assert_close(found.affine, expected.affine, rtol=0, atol=1e-4)


@needs_real_ct
@pytest.mark.parametrize("axcodes", ["LPS", "SAR", "PIR"])
def test_any_axis_order_gives_the_same_volume(tmp_path, axcodes):
    expected = ras(real_ct()[0])
    turned = Orientationd("image", axcodes=axcodes, labels=None)({"image": expected})["image"]
    found = ras(write_nifti(tmp_path / "turned.nii.gz", turned[0].numpy(), turned.affine.numpy()))
    torch.testing.assert_close(found.as_tensor(), expected.as_tensor())
    torch.testing.assert_close(found.affine, expected.affine, rtol=0, atol=1e-4)


def test_item_is_left_as_it_was_and_keys_may_be_missing(tmp_path):
    path = write_nifti(tmp_path / "ct.nii", phantom())
    item = {"image": path, "name": "ct"}
    loaded = LoadCTd(["image", "prior"], allow_missing_keys=True)(item)
    assert item["image"] is path and loaded["name"] == "ct" and loaded["image"].shape == (1, 20, 16, 12)
    with pytest.raises(KeyError, match="prior"):
        LoadCTd(["image", "prior"])(item)


def test_slope_and_intercept_of_the_header_are_applied(tmp_path):
    image = nib.Nifti1Image(phantom() + 1024, np.diag([2, 2, 2, 1]))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "ct.nii")
    torch.testing.assert_close(ras(tmp_path / "ct.nii")[0].as_tensor(), torch.from_numpy(phantom()).float())


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", ">f4", "<f8"])
def test_every_number_type_of_nifti(tmp_path, name, kind, dtype):
    header = kind.header_class(endianness=dtype[0])
    header.set_data_dtype(dtype)
    image = kind(phantom().clip(-1000 if "u" not in dtype else 0).astype(dtype), np.diag([2, 2, 2, 1]), header)
    image.to_filename(tmp_path / name)
    assert nib.load(tmp_path / name).dataobj.dtype == dtype
    found = LoadCTd("image", check_hu="u" not in dtype)({"image": tmp_path / name})["image"]
    assert found.dtype == (torch.int16 if dtype == "<i2" else torch.float32)
    np.testing.assert_array_equal(found[0], np.asarray(image.dataobj))


def test_a_plain_file_stays_on_disk_until_its_voxels_are_used(tmp_path):
    path = write_nifti(tmp_path / "ct.nii", phantom((32, 32, 32)).repeat(8, 0).repeat(8, 1).repeat(8, 2))
    before = resident()
    volume = LoadCTd("image")({"image": path})["image"]
    assert volume.numel() * 2 == 32 << 20 and resident() - before < 16 << 20


def resident() -> int:
    """Bytes of memory that belong to this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("shape", [(20, 16, 12, 1), (20, 16, 12, 1, 1)])
def test_single_time_point_is_a_volume(tmp_path, shape):
    path = write_nifti(tmp_path / "ct.nii.gz", phantom().reshape(shape))
    torch.testing.assert_close(LoadCTd("image")({"image": path})["image"].shape, (1, 20, 16, 12))


def test_single_time_point_of_an_itk_file_is_a_volume(tmp_path):
    write_itk(tmp_path / "ct.mha", phantom()[None])
    assert LoadCTd("image")({"image": tmp_path / "ct.mha"})["image"].shape == (1, 12, 16, 20)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.stack([phantom()] * 3, -1), "not one 3D volume (20 x 16 x 12, 3 channels)"),
        (phantom()[..., 0], "not one 3D volume"),
        (phantom()[:, :, :1], "one voxel thick (20 x 16 x 1)"),
        (phantom()[:, :1], "one voxel thick (20 x 1 x 12)"),
        (phantom()[..., :2], "two voxels thick (20 x 16 x 2)"),
        (np.full((20, 16, 12), -1000, np.int16), "empty, 99 % of its voxels are -1000"),
        (np.where(phantom() > 100, np.nan, phantom()).astype(np.float32), "NaN or infinity in"),
        (np.where(phantom() > 100, -np.inf, phantom()).astype(np.float32), "NaN or infinity in"),
        (phantom() + 1024, "which are not HU"),
        (phantom() - 8192, "which are not HU"),
        (np.where(np.indices((20, 16, 12)).sum(0) < 3, -3024, phantom() + 1024).astype(np.int16), "which are not HU"),
        ((phantom() / 1000).astype(np.float32), "which are not HU"),
        (np.where(np.indices((20, 16, 12)).sum(0) < 3, 1e30, phantom()).astype(np.float32), "which are no HU"),
        (np.where(np.arange(12) < 3, 0, phantom()).astype(np.int16), "is exactly 0 HU in 25% of its voxels"),
        (np.where(phantom() < -940, 32767, phantom()).astype(np.int16), "which are not HU"),
        (np.where(np.arange(12) < 3, 3071, phantom()).astype(np.int16), "which are not HU"),
        (np.stack([phantom()[..., None]] * 3, -1), "not one 3D volume (20 x 16 x 12, 1 x 3 channels)"),
    ],
)
def test_bad_content(tmp_path, array, message):
    assert message in refusal(write_nifti(tmp_path / "ct.nii.gz", array))


def test_hu_check_can_be_left_out(tmp_path):
    path = write_nifti(tmp_path / "ct.nii.gz", phantom() + 1024)
    assert "from " in refusal(path) and LoadCTd("image", check_hu=False)({"image": path})["image"].min() > 0


@pytest.mark.parametrize(
    "affine, message",
    [
        (np.diag([0.0007, 0.0007, 0.0025, 1]), "voxel spacing of 0.0007 x 0.0007 x 0.0025 mm"),
        (np.diag([700.0, 700, 2500, 1]), "voxel spacing of 700 x 700 x 2500 mm"),
        (np.diag([2.0, 2, 25, 1]), "voxel spacing of 2 x 2 x 25 mm"),
        (np.diag([2.0, 2, 1, 1]), "shows 40 x 32 x 12 mm of a patient"),
        (2 * np.array([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1.01, 0], [0, 0, 0, 0.5]]), "do not span space"),
    ],
)
def test_bad_affine(tmp_path, affine, message):
    image = nib.Nifti1Image(phantom(), None)
    image.header.set_sform(affine, code=1)
    image.header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    nib.save(image, tmp_path / "ct.nii")
    assert message in refusal(tmp_path / "ct.nii")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_broken_affine_is_refused_or_mended_from_the_header(tmp_path, value):
    """MONAI falls back to the spacing in the header where sform is broken; where both are, the file is refused."""
    image = nib.Nifti1Image(phantom(), np.eye(4))
    nib.save(image, tmp_path / "ct.nii")
    content = bytearray((tmp_path / "ct.nii").read_bytes())
    content[280:328] = np.diag([value, 1, 1, 1])[:3].astype("<f4").tobytes()  # sform
    content[80:92] = np.full(3, value, "<f4").tobytes()  # pixdim[1:4]
    (tmp_path / "ct.nii").write_bytes(content)
    refusal(tmp_path / "ct.nii")


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nii", "ct.mha", "ct.mhd", "ct.nrrd", "ct.nhdr"])
@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(1000), np.random.default_rng(0).bytes(5000)],
    ids=["empty", "text", "zeros", "random"],
)
def test_other_content_than_the_name_says(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "cannot be read" in refusal(tmp_path / name)


@pytest.mark.parametrize("name, data", [("ct.mhd", "ct.raw"), ("ct.nhdr", "ct.raw")])
def test_header_without_its_voxels(tmp_path, name, data):
    write_itk(tmp_path / name, phantom())
    whole = (tmp_path / data).read_bytes()
    for length in (len(whole) - 2, len(whole) // 2):
        (tmp_path / data).write_bytes(whole[:length])
        assert "cannot be read" in refusal(tmp_path / name)
    (tmp_path / data).unlink()
    assert "cannot be read" in refusal(tmp_path / name)


def test_a_raw_that_is_shorter_than_its_header_says_is_named(tmp_path):
    path = write_itk(tmp_path / "ct.mhd", phantom())
    whole = (tmp_path / "ct.raw").read_bytes()
    (tmp_path / "ct.raw").write_bytes(whole[:-2])
    assert f"ct.raw has {len(whole) - 2} bytes, and the header tells of {len(whole)}" in refusal(path)
    (tmp_path / "ct.raw").write_bytes(b"preamble" + whole)
    assert f"ct.raw has {len(whole) + 8} bytes" in refusal(path)
    header = path.read_text()
    for size in ("8", "-1"):
        path.write_text(header.replace("ElementDataFile", f"HeaderSize = {size}\nElementDataFile"))
        np.testing.assert_array_equal(LoadCTd("image")({"image": path})["image"][0], phantom().T)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("scl_slope", 1e30, "rescaling of 1e+30"),
        ("scl_inter", np.nan, "cannot be read"),
        ("scl_inter", 1e30, "rescaling"),
        ("scl_slope", np.inf, "rescaling of inf"),
        (["scl_slope", "scl_inter"], (np.nan, -1024), "rescaling of nan x + -1024"),
        ("xyzt_units", 1, "voxel spacing of 2000 x 2000 x 2500 mm"),
        ("xyzt_units", 3, "voxel spacing of 0.002"),
        ("xyzt_units", 7, "unknown unit 7"),
        ("datatype", 1, "holds bits"),
        ("datatype", 9999, "its 9999 is missing or unknown"),
        ("pixdim", (1, 1, 1, 1, 1, 1, 1, 1), "2 x 2 x 2.5 mm by its sform, 1 x 1 x 1 by its qform"),
        ("vox_offset", np.nan, "cannot be read"),
        ("vox_offset", 16, "in the header"),
        ("vox_offset", 354, "cannot be read"),
        ("vox_offset", 1e30, "cannot be read"),
        ("bitpix", 32, "tells of 32 bits a voxel, and of int16"),
        ("datatype", 128, "holds colours (RGB)"),
        ("datatype", 32, "holds complex numbers"),
        ("dim", (3, 20, 16, 11, 1, 1, 1, 1), "cannot be read"),
        ("dim", (3, 20, 16, -12, 1, 1, 1, 1), "cannot be read"),
        ("dim", (3, 32767, 32767, 32767, 1, 1, 1, 1), "cannot be read"),
        ("dim", (3, 2000, 2000, 1000, 1, 1, 1, 1), "cannot be read"),
        ("magic", b"ni1", "not a NIfTI file of header and voxels"),
        ("pixdim", (1, 0, 2, 2.5, 1, 1, 1, 1), "spacing (pixdim) of 0 x 2 x 2.5 mm"),
        ("srow_x", (-2, 0, 0, np.nan), "begins at nan"),
        ("srow_x", (-2, 0, 0, 1e7), "begins at 1e+07"),
        ("srow_x", (2, 0, 0, 0), "sform and qform turn the axes to different sides"),
    ],
)
def test_a_nifti_header_that_cannot_be_true(tmp_path, field, value, message, compressed):
    image = nib.Nifti1Image(phantom(), np.diag([-2, -2, 2.5, 1]))
    image.header.set_qform(image.affine, code=1)
    content = bytearray(image.to_bytes())
    header = np.ndarray((), image.header.template_dtype, content)
    for key, new in zip(field, value, strict=True) if isinstance(field, list) else [(field, value)]:
        header[key] = new
    path = tmp_path / ("ct.nii.gz" if compressed else "ct.nii")
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert message in refusal(path)


@pytest.mark.parametrize("slope, intercept", [(np.nan, np.nan), (0, 0), (0, -1024), (np.nan, 0)])
def test_what_stands_for_no_rescaling_in_nifti(tmp_path, slope, intercept):
    content = bytearray(nib.Nifti1Image(phantom(), np.diag([-2, -2, 2.5, 1])).to_bytes())
    header = np.ndarray((), nib.Nifti1Header.template_dtype, content)
    header["scl_slope"], header["scl_inter"] = slope, intercept
    (tmp_path / "ct.nii").write_bytes(content)
    np.testing.assert_array_equal(LoadCTd("image")({"image": tmp_path / "ct.nii"})["image"][0], phantom())


@pytest.mark.parametrize("name", ["ct.nii", "ct.nhdr", "ct.mha"])
@pytest.mark.parametrize("unit, factor", [("cm", 10), ("m", 1000), ("um", 0.001)])
def test_other_units_are_mm_in_the_end(tmp_path, name, unit, factor):
    spacing = np.array([2, 2, 2]) / factor
    path = tmp_path / name
    if name == "ct.nii":
        if unit == "cm":
            return  # which NIfTI has no code for
        image = nib.Nifti1Image(phantom(), np.diag([*spacing, 1]))
        image.header.set_xyzt_units({"m": "meter", "um": "micron"}[unit])
        nib.save(image, path)
    elif name == "ct.nhdr":
        header = {"space": "RAS", "space directions": np.diag(spacing), "space units": [unit] * 3}
        nrrd.write(str(path), phantom(), header | {"space origin": np.zeros(3)})
    else:
        write_itk(path, phantom().T)
        words = " ".join(map(repr, spacing.tolist())).encode()
        content = path.read_bytes().replace(b"ElementSpacing = 2 2 2", b"ElementSpacing = " + words)
        path.write_bytes(content.replace(b"ElementDataFile", f"DistanceUnits = {unit}\nElementDataFile".encode()))
    found = LoadCTd("image")({"image": path})["image"]
    np.testing.assert_allclose(found.pixdim, 2, rtol=1e-5)
    np.testing.assert_array_equal(found[0], phantom())


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_more_or_less_than_the_header_tells_is_refused(tmp_path, name):
    content = nib.Nifti1Image(phantom(), np.diag([-2, -2, 2.5, 1])).to_bytes()
    for wrong in (content + bytes(16), content + bytes(1 << 24), content[:-1]):
        (tmp_path / name).write_bytes(gzip.compress(wrong) if name.endswith("gz") else wrong)
        assert "cannot be read" in refusal(tmp_path / name)


def test_the_other_byte_order_is_refused(tmp_path):
    image = nib.Nifti1Image(phantom(), np.diag([-2, -2, 2.5, 1]))
    (tmp_path / "ct.nii").write_bytes(image.to_bytes()[:352] + phantom().byteswap().tobytes("F"))
    assert "not HU" in refusal(tmp_path / "ct.nii")


def test_pipes_and_devices_are_refused(tmp_path):
    for name in ("ct.nii", "ct.nii.gz", "ct.nrrd", "ct.mha"):
        os.mkfifo(tmp_path / name)
        assert "is a pipe or a device" in refusal(tmp_path / name)
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    assert "is a pipe or a device" in refusal(tmp_path / "zero.nii")
    path = write_itk(tmp_path / "a.mhd", phantom())
    (tmp_path / "a.raw").unlink()
    os.mkfifo(tmp_path / "a.raw")
    assert "a.raw is a pipe or a device" in refusal(path)


def test_what_no_file_of_its_size_can_hold_is_refused_before_memory_is_asked_for(tmp_path):
    header = nib.Nifti1Image(phantom(), np.eye(4)).header
    header.set_data_shape((1600, 1600, 1600))
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4) + bytes(1000)))
    nrrd.write(str(tmp_path / "ct.nrrd"), phantom())
    content = (tmp_path / "ct.nrrd").read_bytes().replace(b"sizes: 20 16 12", b"sizes: 1600 1600 1600")
    (tmp_path / "ct.nrrd").write_bytes(content)
    write_itk(tmp_path / "ct.mha", phantom(), compression=True)
    content = (tmp_path / "ct.mha").read_bytes().replace(b"DimSize = 12 16 20", b"DimSize = 1600 1600 1600")
    (tmp_path / "ct.mha").write_bytes(content)
    tracemalloc.start()
    for path in (tmp_path / "ct.nii.gz", tmp_path / "ct.nrrd", tmp_path / "ct.mha"):
        assert "cannot be read" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_a_field_of_view_that_no_scanner_has_is_refused(tmp_path):
    """Its voxels on a grid of 1 mm would take gigabytes."""
    path = write_nifti(tmp_path / "ct.nii", phantom((80, 80, 40)), np.diag([-15.0, -15, 15, 1]))
    assert "shows 1200 x 1200 x 600 mm of a patient" in refusal(path)
    assert LoadCTd("image")({"image": write_nifti(path, phantom((40, 40, 160)), np.diag([-15.0, -15, 15, 1]))})


def blank(path: Path) -> Path:
    """A file of each format whose header says nothing of its axes."""
    match path.name:
        case "identity.nii.gz":
            return write_nifti(path, phantom((30, 30, 30)), np.eye(4))
        case "forms.nii":
            image = nib.Nifti1Image(phantom((30, 30, 30)), None)
            image.header.set_zooms((2, 2, 2))
            nib.save(image, path)
            content = bytearray(path.read_bytes())
            content[252:256] = bytes(4)  # qform_code, sform_code
            path.write_bytes(content)
        case "plain.nrrd":
            nrrd.write(str(path), phantom((30, 30, 30)))
        case "spacings.nrrd":
            nrrd.write(str(path), phantom((30, 30, 30)), {"spacings": [2.0, 2.0, 2.0]})
        case "space.nrrd":
            nrrd.write(str(path), phantom((30, 30, 30)), {"space dimension": 3, "space directions": 2 * np.eye(3)})
        case "ct.mha":
            write_itk(path, phantom((30, 30, 30)))
            lines = path.read_bytes().split(b"\n", 14)
            path.write_bytes(b"\n".join(line for line in lines if not line.startswith(b"TransformMatrix")))
    return path


@pytest.mark.parametrize(
    "name", ["identity.nii.gz", "forms.nii", "plain.nrrd", "spacings.nrrd", "space.nrrd", "ct.mha"]
)
def test_a_blank_header_is_a_warning_that_names_what_is_assumed_or_refused(tmp_path, caplog, name):
    path = blank(tmp_path / name)
    step = "1 x 1 x 1" if name in ("identity.nii.gz", "plain.nrrd") else "2 x 2 x 2"
    for _ in range(2):
        assert LoadCTd("image")({"image": path})["image"].shape == (1, 30, 30, 30)
    (record,) = caplog.records  # once a file
    assert str(path) in record.message and f"{step} mm and axes towards" in record.message
    assert "may be mirrored" in refusal(path, check_sides=True)


@needs_real_ct
def test_a_header_that_says_all_is_no_guess(tmp_path, caplog):
    for path in (real_ct()[0], write_nifti(tmp_path / "ct.nii", phantom())):
        LoadCTd("image", check_sides=True)({"image": path})
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["i1", "i2", ">i2", "u2", "i4", "i8", "f4", ">f8"])
@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_every_number_type_of_nrrd(tmp_path, dtype, encoding):
    array = (phantom() // 10).astype(dtype)
    header = {"space": "RAS", "space directions": np.diag([2.0, 2.5, 3.0]), "encoding": encoding}
    nrrd.write(str(tmp_path / "ct.nrrd"), array, header)
    found = LoadCTd("image", check_hu=False)({"image": tmp_path / "ct.nrrd"})["image"]
    np.testing.assert_array_equal(found[0], array.astype(float))
    np.testing.assert_allclose(found.affine, np.diag([2, 2.5, 3, 1]))


@pytest.mark.parametrize("kinds", [["list", "domain", "domain", "domain"], ["domain", "domain", "domain", "time"]])
def test_a_fourth_axis_of_nrrd(tmp_path, kinds):
    last = kinds[-1] == "time"
    directions = np.vstack([np.full(3, np.nan), np.diag([2.0, 2.5, 3.0])])
    header = {
        "space": "LPS",
        "kinds": kinds,
        "space directions": np.roll(directions, 3, axis=0) if last else directions,
    }
    for count in (1, 2):
        array = np.stack([phantom()] * count, -1 if last else 0)
        nrrd.write(str(tmp_path / "ct.nrrd"), array, header)
        if count == 1:
            found = LoadCTd("image")({"image": tmp_path / "ct.nrrd"})["image"]
            np.testing.assert_array_equal(found[0], phantom())
            np.testing.assert_allclose(found.affine, np.diag([-2, -2.5, 3, 1]))
        else:
            assert "not one 3D volume (20 x 16 x 12, 2 channels)" in refusal(tmp_path / "ct.nrrd")


@pytest.mark.parametrize(
    "line, message",
    [
        ("NDims = -1", "contradicts itself"),
        ("NDims = 4", "contradicts itself"),
        ("DimSize = 12 16 -20", "cannot be read"),
        ("DimSize = 12 16 19", "cannot be read"),
        ("CompressedData = True", "cannot be read"),
        ("ElementType = MET_FLOAT", "cannot be read"),
        ("ElementType = MET_SHORT_ARRAY", "holds MET_SHORT_ARRAY, not one number a voxel"),
        ("ElementNumberOfChannels = 3", "3 channels"),
        ("ElementSpacing = 0 2 2", "voxel spacing of 0"),
        ("ElementSpacing = 2 2", "cannot be read"),
        ("TransformMatrix = 1 0 0 0 1 0 0 0 0", "voxel spacing"),
        ("BinaryData = False", "stored as text"),
        ("ElementSpacing = -2 2 2", "its ElementSpacing is -2 2 2"),
        ("TransformMatrix = 2 0 0 0 2 0 0 0 2", "TransformMatrix is no matrix of directions"),
        ("DistanceUnits = furlong", "its lengths are in 'furlong'"),
        ("DistanceUnits = m", "voxel spacing of 2000"),
        ("ElementToIntensityFunctionOffset = -1024", "not HU"),
        ("Modality = MET_MOD_MR", "is no CT, by its header (MET_MOD_MR)"),
        ("ObjectType = Tube", "is no CT, by its header (Tube)"),
        ("ElementDataFile =", "its voxels, a file without a name"),
        ("ElementDataFile = ct%s.raw 1 2 1", "no pattern of file names"),
        ("ElementDataFile = LIST", "cannot be read"),
        ("ElementDataFile = other.raw", "its voxels, other.raw, are not beside it"),
        ("ElementDataFile = ct%03d.raw 1 99999999 1", "cannot be read"),
    ],
)
@pytest.mark.parametrize("name", ["ct.mha", "ct.mhd"])
def test_a_metaimage_header_that_cannot_be_true(tmp_path, name, line, message):
    path = write_itk(tmp_path / name, phantom())
    key = line.split(" = ")[0].encode()
    head, mark, voxels = path.read_bytes().partition(b"ElementDataFile")
    lines = [kept for kept in head.split(b"\n") if not kept.startswith(key)]
    if key == b"ElementDataFile":
        mark, voxels = line.encode(), b"\n" + voxels.partition(b"\n")[2]
    else:
        lines.insert(-1, line.encode())
    path.write_bytes(b"\n".join(lines) + mark + voxels)
    assert message in refusal(path)


def test_a_metaimage_that_says_a_thing_twice(tmp_path):
    path = write_itk(tmp_path / "ct.mha", phantom())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"DimSize", b"DimSize = 16 12 20\nDimSize", 1))
    assert "two values of DimSize" in refusal(path)


def test_a_metaimage_with_a_rescaling_or_as_text(tmp_path):
    path = write_itk(tmp_path / "ct.mha", phantom().T + 1024)
    content = path.read_bytes()
    rescaled = b"ElementToIntensityFunctionSlope = 1\nElementToIntensityFunctionOffset = -1024\nElementDataFile = local"
    path.write_bytes(content.replace(b"ElementDataFile = LOCAL", rescaled))
    np.testing.assert_array_equal(LoadCTd("image")({"image": path})["image"][0], phantom())
    head = content.partition(b"LOCAL\n")[0].replace(b"BinaryData = True", b"BinaryData = False") + b"LOCAL\n"
    path.write_bytes(head + " ".join(map(str, phantom().ravel("F"))).encode())
    np.testing.assert_array_equal(LoadCTd("image")({"image": path})["image"][0], phantom())


def as_nrrd(path: Path, voxels: bytes, tail: str = "", **fields: str) -> Path:
    header = {"type": "short", "dimension": "3", "space": "RAS", "sizes": "20 16 12", "endian": "little"}
    header |= {"space directions": "(2,0,0) (0,2.5,0) (0,0,3)", "space origin": "(0,0,0)", "encoding": "raw"}
    lines = [f"{key}: {value}" for key, value in (header | fields).items() if value]
    path.write_bytes("\n".join(["NRRD0004", *lines, tail, ""]).encode() + voxels)
    return path


@pytest.mark.parametrize("encoding", ["ascii", "text", "hex"])
def test_nrrd_in_words(tmp_path, encoding):
    voxels = phantom().tobytes("F").hex() if encoding == "hex" else " ".join(map(str, phantom().ravel("F")))
    path = as_nrrd(tmp_path / "ct.nrrd", voxels.encode(), encoding=encoding)
    np.testing.assert_array_equal(LoadCTd("image")({"image": path})["image"][0], phantom())
    as_nrrd(path, voxels[: len(voxels) // 2].encode(), encoding=encoding)
    assert "cannot be read" in refusal(path)


def test_a_nrrd_of_one_file_a_slice(tmp_path):
    for z in range(12):
        (tmp_path / f"é {z:03d}.raw").write_bytes(phantom()[..., z].tobytes("F"))
    listed = "\n".join(f"é {z:03d}.raw" for z in range(12))
    path = as_nrrd(tmp_path / "ct.nhdr", b"", f"data file: LIST\n{listed}")
    np.testing.assert_array_equal(LoadCTd("image")({"image": path})["image"][0], phantom())
    for z in range(12):
        (tmp_path / f"é {z:03d}.raw").rename(tmp_path / f"ct{z:03d}.raw")
    as_nrrd(path, b"", "data file: ct%03d.raw 0 11 1 2")
    np.testing.assert_array_equal(LoadCTd("image")({"image": path})["image"][0], phantom())
    as_nrrd(path, b"", "data file: ct%03d.raw 0 11 1 3")
    assert "not in one a slice" in refusal(path)
    (tmp_path / "ct007.raw").unlink()
    as_nrrd(path, b"", "data file: ct%03d.raw 0 11 1")
    assert "ct007.raw, are not beside it" in refusal(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"spacings": "1 1 1"}, "contradict each other"),
        ({"space directions": "none none none"}, "no directions in space"),
        ({"space directions": "", "spacings": "nan 2 2"}, "voxel spacing of nan"),
        ({"space units": '"mm" "cm" "mm"'}, "different units, cm, mm"),
        ({"type": "foo"}, "foo is missing or unknown"),
    ],
)
def test_a_nrrd_header_that_cannot_be_true(tmp_path, fields, message):
    assert message in refusal(as_nrrd(tmp_path / "ct.nrrd", phantom().tobytes("F"), **fields))


def test_a_metaimage_of_one_file_a_slice(tmp_path):
    path = write_itk(tmp_path / "ct.mhd", phantom())
    for z, content in enumerate(phantom()):
        content.tofile(tmp_path / f"ct{z:03d}.raw")
    header = path.read_text()
    for data in ("ct%03d.raw 0 19 1", "LIST\n" + "\n".join(f"ct{z:03d}.raw" for z in range(20))):
        path.write_text(header.replace("ct.raw", data))
        np.testing.assert_array_equal(LoadCTd("image")({"image": path})["image"][0], phantom().T)
    (tmp_path / "ct007.raw").unlink()
    assert "ct007.raw" in refusal(path)


def test_wrong_paths(tmp_path):
    assert "does not exist" in refusal(tmp_path / "ct.nii.gz")
    (tmp_path / "ct.png").touch()
    assert "is neither .nii, .nii.gz" in refusal(tmp_path / "ct.png")
    (tmp_path / "empty").mkdir()
    assert "holds 0 readable DICOM series" in refusal(tmp_path / "empty")


def test_dicom_series_must_be_one_and_whole(tmp_path):
    image = itk.image_from_array(np.ascontiguousarray(phantom((24, 16, 10))))
    image.SetSpacing((2, 2, 2.5))
    write_dicom(image, tmp_path / "whole")
    assert LoadCTd("image")({"image": tmp_path / "whole"})["image"].shape == (1, 10, 16, 24)
    write_dicom(image, tmp_path / "gap", leave_out=(12,))
    assert "off an even spacing: files of the series are missing" in refusal(tmp_path / "gap")
    write_dicom(image, tmp_path / "whole", series=2, leave_out=tuple(range(3, 24)))
    message = refusal(tmp_path / "whole")
    assert "holds 2 readable DICOM series" in message and "24" in message and "3" in message
    write_dicom(image, tmp_path / "slice", leave_out=tuple(range(1, 24)))
    assert "one voxel thick (10 x 16 x 1)" in refusal(tmp_path / "slice")


@pytest.fixture(scope="module", params=["ct.nii.gz", "ct.nii", "ct.mha", "ct.nrrd"])
def written(request, tmp_path_factory) -> tuple[Path, bytes, torch.Tensor]:
    path = tmp_path_factory.mktemp("cut") / request.param
    write_itk(path, phantom(), compression=request.param == "ct.nrrd")
    return path, path.read_bytes(), LoadCTd("image")({"image": path})["image"].as_tensor()


@settings(max_examples=40, deadline=5000)
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_off_files_are_refused(written, share):
    path, content, volume = written
    length = int(share * len(content))
    path.write_bytes(content[:length])
    # The last bytes of a gzip stream are its check sum: without them all voxels may still be there, and must be right.
    try:
        found = LoadCTd("image")({"image": path})["image"].as_tensor()
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert length >= len(content) - 16 and torch.equal(found, volume)


PIXDIM, SIZE = (3.0, 3.0, 6.0), (112, 112, 56)  # half of the published resolution, for speed


def preprocessing() -> list:
    """From a path to the whole volume in RAS, clipped before it is interpolated, and scaled to [-1, 1]."""
    return [
        LoadCTd("image", hu_range=(-1000, 1000)),
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=PIXDIM, mode="bilinear", dtype="float32"),
        ScaleIntensityRanged("image", a_min=-1000, a_max=1000, b_min=-1, b_max=1, clip=True),
    ]


def config_chain(name: str) -> Compose:
    """A chain of the pretrain bundle's train.json, reports left out, for the size and spacing of this module."""
    parser = ConfigParser()
    parser.read_config(Path(__file__).parents[3] / "bundles" / "pretrain" / "configs" / "train.json")
    parser.update({"pixdim": PIXDIM, "img_size": SIZE, "read_transforms": parser["read_transforms"][:-1]})
    return parser.get_parsed_content(name)


# With an argument that only NumPy's pad knows, MONAI hands the padding to NumPy, which reflects as often as it must;
# torch.nn.functional.pad refuses to pad by more than the volume's own size.
REFLECT = {"mode": "reflect", "reflect_type": "even"}


@pytest.mark.parametrize("shape", [(64, 64, 32), (120, 9, 2), (1, 112, 56)])
def test_volumes_much_smaller_than_the_region_are_reflected_into_it(shape):
    volume = torch.rand(1, *shape)
    padded = SpatialPadd("image", SIZE, **REFLECT)({"image": MetaTensor(volume)})["image"]
    assert padded.shape == (1, *(max(pair) for pair in zip(shape, SIZE)))
    # Reflected without repeating the border: index i of the padded axis shows the voxel that a mirror walk reaches.
    expected = volume[0]
    for axis, (size, target) in enumerate(zip(shape, padded.shape[1:])):
        steps = np.abs(np.arange(target) - (target - size) // 2) % max(2 * (size - 1), 1)
        index = np.minimum(steps, 2 * (size - 1) - steps) if size > 1 else np.zeros(target, int)
        expected = expected.index_select(axis, torch.from_numpy(index))
    torch.testing.assert_close(padded[0].as_tensor(), expected)


@needs_real_ct
def test_padding_value_of_the_scanner_leaves_no_ring():
    """-3024 outside the field of view must not be mixed into the voxels at its edge."""
    image = Compose(preprocessing())({"image": real_ct()[0]})["image"]
    assert image.min() == -1 and image.max() <= 1
    corner = image[0, 0, 0]
    assert (corner == -1).all()
    # Clipped after interpolation only, the edge of the field of view is darker by much more than rounding.
    late = Compose([LoadCTd("image"), *preprocessing()[1:]])({"image": real_ct()[0]})["image"]
    assert ((image - late) > 0.1).any()


@needs_real_ct
def test_training_chain_gives_a_region_of_the_wanted_size():
    chain = config_chain("train#preprocessing").set_random_state(0)
    for _ in range(3):
        image = chain({"image": real_ct()[0]})["image"]
        assert type(image) is torch.Tensor and image.shape == (1, *SIZE) and image.dtype == torch.float32


@needs_real_ct
@pytest.mark.parametrize("axcodes", ["RAS", "PIR"])
def test_lazy_geometry_reads_the_same_anatomy_as_one_step_after_the_other(tmp_path, axcodes):
    turned = Orientationd("image", axcodes=axcodes, labels=None)({"image": ras(real_ct()[0])})["image"]
    path = write_nifti(tmp_path / "ct.nii", turned[0].numpy().astype(np.int16), turned.affine.numpy())
    lazy = config_chain("validate#preprocessing")({"image": path})["image"]
    steps = [*preprocessing(), CenterSpatialCropd("image", SIZE), SpatialPadd("image", SIZE, **REFLECT)]
    eager = Compose(steps)({"image": path})["image"]
    np.testing.assert_allclose(lazy.affine, eager.affine, atol=1e-4)
    torch.testing.assert_close(lazy.as_tensor(), eager.as_tensor(), atol=1e-3, rtol=0)


@needs_real_ct
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0)])
def test_plain_int16_is_not_converted_and_its_file_never_written_to(tmp_path, axes):
    image = ras(real_ct()[0])
    affine = image.affine.numpy()[:, [*axes, 3]]
    path = write_nifti(tmp_path / "ct.nii", image[0].numpy().astype(np.int16).transpose(axes), affine)
    before = path.read_bytes()
    raw = LoadCTd("image")({"image": path})["image"]
    assert raw.dtype == torch.int16
    clipped = LoadCTd("image", hu_range=(-1000, 500))({"image": path})["image"]
    assert (clipped.min(), clipped.max()) == (-1000, 500)
    assert torch.equal(clipped.as_tensor(), raw.as_tensor().clamp(-1000, 500))
    floats = LoadCTd("image", hu_range=(-1000.0, 500.0))({"image": path})["image"]
    assert floats.dtype == torch.int16 and torch.equal(floats.as_tensor(), clipped.as_tensor())
    assert path.read_bytes() == before
    found = Orientationd("image", axcodes="RAS", labels=None)({"image": raw})["image"]
    torch.testing.assert_close(found.as_tensor().float(), image.as_tensor())


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32])
@pytest.mark.parametrize(
    "hu_range", [[-1000.0, 100.0], [-1000, 100], [-100, 300], [10, 300], [-950.5, 99.5], [20.0, 900.0], [-300, -100]]
)
def test_clipping_gives_the_values_of_the_range_in_any_number_type(tmp_path, dtype, hu_range):
    low = 0 if dtype == np.uint8 else -1024
    values = np.random.default_rng(0).integers(low, 256, (20, 16, 12)).astype(dtype)
    path = write_nifti(tmp_path / "ct.nii", values)
    image = LoadCTd("image", hu_range=hu_range, check_hu=False)({"image": path})["image"]
    np.testing.assert_array_equal(image[0].numpy(), values.astype(np.float64).clip(*hu_range))


@needs_real_ct
@pytest.mark.parametrize("axcodes", ["RAS", "PIR"])
def test_map_goes_back_to_the_grid_of_the_file(tmp_path, axcodes):
    """A map made on the preprocessed grid, inverted, has the file's shape and affine and lies on the same anatomy."""
    turned = Orientationd("image", axcodes=axcodes, labels=None)({"image": ras(real_ct()[0])})["image"]
    path = write_nifti(tmp_path / "ct.nii.gz", turned[0].numpy(), turned.affine.numpy())
    chain = Compose(
        [*preprocessing(), CenterSpatialCropd("image", SIZE), SpatialPadd("image", spatial_size=SIZE, **REFLECT)]
    )
    item = chain({"image": path})
    assert item["image"].shape == (1, *SIZE)
    item["pred"] = MetaTensor(item["image"].as_tensor().clone())  # the map: the volume itself
    back = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=False, to_tensor=True)(item)["pred"]

    file = nib.load(path)
    assert back.shape == (1, *file.shape)
    np.testing.assert_allclose(back.affine, file.affine, atol=1e-4)
    # Compared in RAS, inside the part that the centre crop kept: values return, but for two interpolations.
    original = (ras(path)[0].as_tensor().clamp(-1000, 1000) / 1000).numpy()
    returned = Orientationd("pred", axcodes="RAS", labels=None)({"pred": back})["pred"][0].numpy()
    kept = np.s_[15:-15, 15:-15, 2:-2]
    assert np.corrcoef(original[kept].ravel(), returned[kept].ravel())[0, 1] > 0.98


# label maps


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    """A scan and its label map."""
    volume = np.full((12, 10, 8), -900, np.int16)
    volume[3:6] = 40
    labels = np.zeros(volume.shape, np.uint8)
    labels[3:6] = 1
    labels[8] = 2
    for name, array in (("image", volume), ("label", labels)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / f"{name}.nii.gz")
    return tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", labels


def read(image: Path, label: Path, **keys) -> MetaTensor:
    item = LoadCTd("image")({"image": image, "label": label})
    return LoadLabeld("label", ["left lung", "right lung"], **keys)(item)["label"]


def test_a_label_map_is_read_as_class_indices(pair: tuple) -> None:
    image, label, values = pair
    found = read(image, label)
    assert found.dtype == torch.uint8 and found.shape == (1, 12, 10, 8)
    np.testing.assert_array_equal(found.numpy()[0], values)
    # all at once: 1 becomes 2 and 2 becomes 1
    np.testing.assert_array_equal(
        read(image, label, label_values={"1": 2, "2": 1}).numpy()[0],
        [0, 2, 1] @ np.eye(3)[values].transpose(0, 1, 3, 2),
    )


def test_values_outside_the_classes_are_told(pair: tuple) -> None:
    image, label, values = pair
    nib.save(nib.Nifti1Image(values * 3, np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match=r"label.nii.gz holds label values \[3, 6\].*label_values"):
        read(image, label)
    found = read(image, label, label_values={"3": 1, "6": 0})
    np.testing.assert_array_equal(found.numpy()[0], values == 1)
    nib.save(nib.Nifti1Image(values * 0.5, np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match="not whole"):
        read(image, label)


def test_another_shape_or_place_is_told(pair: tuple) -> None:
    image, label, values = pair
    nib.save(nib.Nifti1Image(values[:-1], np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match="11 x 10 x 8 voxels and .*image.nii.gz has 12 x 10 x 8"):
        read(image, label)
    nib.save(nib.Nifti1Image(values, np.diag([-2.0, 2.0, 3.0, 1.0])), label)
    with pytest.raises(InputError, match=r"label.nii.gz lies 44.0 mm off .*image.nii.gz"):
        read(image, label)
    moved = np.diag([2.0, 2.0, 3.0, 1.0])
    moved[0, 3] = 0.1  # what rounding in a header does
    nib.save(nib.Nifti1Image(values, moved), label)
    assert read(image, label).any()


def test_an_empty_label_map_is_a_warning(pair: tuple, caplog: pytest.LogCaptureFixture) -> None:
    image, label, values = pair
    nib.save(nib.Nifti1Image(values * 0, np.diag([2.0, 2.0, 3.0, 1.0])), label)
    with caplog.at_level(logging.WARNING):
        assert not read(image, label).any()
    assert "label.nii.gz holds none of the classes" in caplog.text
