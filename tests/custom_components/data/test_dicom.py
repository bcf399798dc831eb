"""DICOM folders: what is read is where the scanner put it, and what cannot be placed is refused."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import itk
import numpy as np
import pytest
from custom_components.data import decompress
from custom_components.data.dicom import read_dicom
from custom_components.data.read import LoadCTd
from custom_components.data.volume import Raw, Unfit
from monai.transforms import Orientationd, Spacingd
from pydicom import Dataset, Sequence, dcmread
from pydicom.uid import EnhancedCTImageStorage, JPEG2000Lossless, MRImageStorage, RLELossless, RTStructureSetStorage
from scipy.ndimage import map_coordinates

from tests.conftest import write_dicom

SHAPE, SPACING = (20, 16, 12), (2.0, 2.5, 3.0)


def hu(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Noise around air and tissue, int16 [X, Y, Z], no two slices alike."""
    volume = np.random.default_rng(0).normal(-900, 30, shape)
    volume[4:-4] += 950
    return volume.astype(np.int16)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = itk.image_from_array(np.ascontiguousarray(hu().T))
    image.SetSpacing(SPACING)
    image.SetOrigin((10.0, -20.0, 30.0))
    folder = tmp_path_factory.mktemp("dicom") / "ct"
    write_dicom(image, folder)
    return folder


@pytest.fixture
def series(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "ct"))


def edit(folder: Path, change: Callable[[Dataset, int], None], only: tuple[int, ...] = range(SHAPE[2])) -> None:
    for i, path in enumerate(sorted(folder.glob("1_*.dcm"))):
        if i in only:
            header = dcmread(path)
            change(header, i)
            header.save_as(path)


def voxels(raw: Raw) -> np.ndarray:
    return raw.hu().astype(np.float32)


def assert_whole(raw: Raw) -> None:
    np.testing.assert_array_equal(voxels(raw), hu())
    expected = np.diag([-2.0, -2.5, 3.0, 1.0])
    expected[:3, 3] = -10, 20, 30
    np.testing.assert_allclose(raw.affine, expected, atol=1e-6)


def test_values_and_place(series: Path) -> None:
    assert_whole(read_dicom(series))


@pytest.mark.parametrize("only", [range(SHAPE[2]), (5,)], ids=["all", "one"])
@pytest.mark.parametrize(
    "keyword",
    ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept", "Rows"],
)
def test_what_is_absent_is_not_guessed(series: Path, keyword: str, only: tuple[int, ...]) -> None:
    edit(series, lambda header, _: header.pop(keyword), only)
    with pytest.raises(Unfit, match=f"{series} has no {keyword} in {len(only)} of 12 slices"):
        read_dicom(series)
    edit(series, lambda header, _: setattr(header, keyword, None), only)
    with pytest.raises(Unfit, match=f"{series} has no {keyword} in {len(only)} of 12 slices"):
        read_dicom(series)


@pytest.mark.parametrize(
    "keyword, value, message",
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 0.9, 0.43588989], "different ImageOrientationPatient, such as 1_003"),
        ("ImageOrientationPatient", [0, 0, 0, 0, 0, 0], "different ImageOrientationPatient"),
        ("PixelSpacing", [2.5, 4], "different PixelSpacing, such as 1_003"),
        ("Columns", 32, "different Columns"),
        ("ImagePositionPatient", [-500, -20, 39], "mm off an even spacing"),
        ("ImagePositionPatient", [10, -20, 41], "mm off an even spacing"),
        ("RescaleSlope", 0, "rescaling"),
        ("SamplesPerPixel", 3, "1_003.dcm holds colours"),
        ("StudyInstanceUID", "1.2.9", "slices of 2 volumes, StudyInstanceUID"),
        ("FrameOfReferenceUID", "1.2.9", "slices of 2 volumes, FrameOfReferenceUID"),
        ("RescaleIntercept", 1024, "slices that are not HU .* such as 1_003.dcm"),
        ("RescaleType", "OD", "slices of OD .RescaleType"),
        ("HighBit", 14, "1_003.dcm stores its voxels in other bits"),
    ],
)
def test_contradictions(series: Path, keyword: str, value: object, message: str) -> None:
    edit(series, lambda header, _: setattr(header, keyword, value), (3,))
    with pytest.raises(Unfit, match=message):
        read_dicom(series)


@pytest.mark.parametrize("keyword", ["ConvolutionKernel", "KVP", "NominalPercentageOfCardiacPhase"])
def test_every_other_slice_of_another_volume(series: Path, keyword: str) -> None:
    values = ["B30", "B60"] if keyword == "ConvolutionKernel" else [40, 80]
    edit(series, lambda header, i: setattr(header, keyword, values[i % 2]))
    with pytest.raises(Unfit, match=f"2 acquisitions of one place, {keyword}"):
        read_dicom(series)


def test_slices_of_two_patients_are_no_volume(series: Path) -> None:
    edit(series, lambda header, i: setattr(header, "PatientID", f"P{i // 6}"))
    with pytest.raises(Unfit, match=r"slices of 2 volumes, PatientID P0 \(6 slices\), P1 \(6 slices\): choose one"):
        read_dicom(series)
    assert read_dicom(series, {"PatientID": "P1"}).voxels.shape == (20, 16, 6)


def test_a_negative_spacing_is_refused(series: Path) -> None:
    edit(series, lambda header, _: setattr(header, "PixelSpacing", [-2.5, 2]))
    with pytest.raises(Unfit, match="PixelSpacing of -2.5 x 2 mm"):
        read_dicom(series)


def test_padding_that_wrapped_around_is_air(series: Path) -> None:
    """-2000 is stored as 63536 where voxels have no sign."""

    def change(header: Dataset, _: int) -> None:
        stored = (header.pixel_array.astype(int) + 1024).astype(np.uint16)
        stored[:4] = 63536
        header.PixelRepresentation, header.RescaleIntercept = 0, -1024
        header.add_new("PixelPaddingValue", "US", 63536)
        header.PixelData = stored.tobytes()

    edit(series, change)
    expected = hu()
    expected[:, :4] = -1000
    np.testing.assert_array_equal(voxels(read_dicom(series)), expected)


@pytest.mark.parametrize("modality, kind, found", [("CT", MRImageStorage, "MR Image Storage"), ("MR", None, "MR")])
def test_class_and_modality_may_not_contradict(series: Path, modality: str, kind: str | None, found: str) -> None:
    edit(
        series, lambda header, _: (setattr(header, "Modality", modality), kind and setattr(header, "SOPClassUID", kind))
    )
    with pytest.raises(Unfit, match=f"0 readable DICOM series of CT .12 of {found}"):
        read_dicom(series)


def test_what_is_no_image_is_no_series(series: Path) -> None:
    header = dcmread(series / "1_000.dcm")
    del header.PixelData, header.Rows, header.Columns
    header.SOPClassUID, header.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.66", "1.9"  # raw data, of a CT
    header.save_as(series / "raw.dcm")
    assert_whole(read_dicom(series))


def test_a_projection_is_no_volume(series: Path) -> None:
    edit(series, lambda header, _: setattr(header, "ImageType", ["DERIVED", "SECONDARY", "AXIAL", "MIP"]))
    with pytest.raises(Unfit, match="but localizers or projections"):
        read_dicom(series)


def test_files_without_the_mark_of_dicom_are_told(series: Path) -> None:
    for path in series.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    with pytest.raises(Unfit, match="12 of no DICOM"):
        read_dicom(series)


def test_pydicom_says_nothing_of_its_own(series: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(series, lambda header, _: setattr(header, "SpecificCharacterSet", "FOO"))
    caplog.clear()
    assert_whole(read_dicom(series))
    assert not caplog.messages


def test_a_slanted_pair_of_axes_is_refused(series: Path) -> None:
    edit(series, lambda header, _: setattr(header, "ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0]))
    with pytest.raises(Unfit, match="no two axes at right angles"):
        read_dicom(series)


@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_damaged_slice_is_named_wherever_it_lies(series: Path, at: int) -> None:
    path = sorted(series.iterdir())[at]
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:400], whole[:200], whole[:100], b"", whole.replace(b"DICM", b"DICN")):
        path.write_bytes(content)
        with pytest.raises(Unfit, match=f"{path}|no [A-Za-z]+ in 1 of 12 slices .{path.name}"):
            read_dicom(series)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Unfit, match=f"{path} cannot be read .*pipe"):
        read_dicom(series)


def localizer(header: Dataset) -> None:
    header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def across(header: Dataset) -> None:
    header.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def screen(header: Dataset) -> None:
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    del header.ImageOrientationPatient, header.ImagePositionPatient


@pytest.mark.parametrize("change", [localizer, across, screen])
@pytest.mark.parametrize("own_series", [False, True])
def test_what_is_no_slice_is_left_out_and_told(
    series: Path, caplog: pytest.LogCaptureFixture, change: Callable, own_series: bool
) -> None:
    header = dcmread(series / "1_000.dcm")
    change(header)
    header.Rows, header.Columns, header.PixelData = 2, 2, bytes(8)
    if own_series:
        header.SeriesInstanceUID += ".9"
    header.save_as(series / "loc.dcm")
    assert_whole(read_dicom(series))
    assert "left out loc.dcm" in caplog.text


def test_localizers_alone_are_no_ct(series: Path) -> None:
    edit(series, lambda header, _: localizer(header))
    with pytest.raises(Unfit, match="0 readable DICOM series of CT, but localizers"):
        read_dicom(series)


def test_other_files_beside_the_slices(series: Path) -> None:
    header = dcmread(series / "1_000.dcm")
    header.Modality, header.SOPClassUID = "RTSTRUCT", RTStructureSetStorage
    header.save_as(series / "structures.dcm")
    (series / "README.txt").write_text("CT")
    (series / "DICOMDIR").write_bytes(b"")
    assert_whole(read_dicom(series))
    edit(series, lambda header, _: (setattr(header, "Modality", "MR"), setattr(header, "SOPClassUID", "1.2.3")))
    with pytest.raises(Unfit, match=r"0 readable DICOM series of CT \(12 of MR, 1 of RTSTRUCT\)"):
        read_dicom(series)


def test_a_tilted_gantry_is_a_sheared_affine_and_is_resampled_where_it_lies(series: Path) -> None:
    move = np.tan(np.radians(15)) * 3.0
    edit(series, lambda header, i: setattr(header, "ImagePositionPatient", [10, round(-20 + i * move, 6), 30 + 3 * i]))
    raw = read_dicom(series)
    np.testing.assert_allclose(raw.affine[:3, 2], [0, -move, 3], atol=1e-5)
    assert "tilted by 15.0 degrees" in raw.version
    chain = [Orientationd("image", axcodes="RAS", labels=None), Spacingd("image", pixdim=(2, 2, 2), dtype="float32")]
    item = LoadCTd("image")({"image": series})
    for transform in chain:
        item = transform(item)
    image = item["image"]
    axes = image.affine.numpy()[:3, :3] / 2
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)  # straightened
    grid = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"))
    index = np.linalg.inv(raw.affine) @ image.affine.numpy()
    places = np.tensordot(index[:3, :3], grid, 1) + index[:3, 3][:, None, None, None]
    inside = ((places >= 0) & (places <= np.array(SHAPE)[:, None, None, None] - 1)).all(0)
    expected = map_coordinates(hu().astype(float), places, order=1, mode="nearest")
    assert inside.mean() > 0.3
    np.testing.assert_allclose(image.numpy()[0][inside], expected[inside], atol=0.5)


def test_a_repeated_slice_is_the_same_slice(series: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(series / "1_004.dcm", series / "copy.dcm")
    assert_whole(read_dicom(series))
    assert "1 slices are there twice" in caplog.text
    header = dcmread(series / "copy.dcm")
    header.PixelData = bytes(len(header.PixelData))
    header.save_as(series / "copy.dcm")
    with pytest.raises(Unfit, match="different slices at one place, 1_004.dcm and copy.dcm"):
        read_dicom(series)


@pytest.mark.parametrize(
    "keyword, values",
    [("AcquisitionNumber", (1, 2)), ("AcquisitionNumber", (None, 2)), ("ConvolutionKernel", ("B30f", "B70f"))],
)
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_two_acquisitions_are_two_and_one_can_be_chosen(
    series: Path, keyword: str, values: tuple, shift: float
) -> None:
    if shift and keyword != "AcquisitionNumber":
        pytest.skip("kernels lie at one place")
    edit(series, lambda header, _: values[0] is None or setattr(header, keyword, values[0]))
    for path in sorted(series.glob("1_*.dcm")):
        header = dcmread(path)
        setattr(header, keyword, values[1])
        header.PixelData = (header.pixel_array + 100).tobytes()
        header.ImagePositionPatient[2] += shift  # within the other, at half its spacing
        header.save_as(series / f"second_{path.name}")
    with pytest.raises(Unfit, match=rf"{keyword} .*\(12 slices\), .*\(12 slices\): choose one by dicom_select"):
        read_dicom(series)
    np.testing.assert_array_equal(voxels(read_dicom(series, {keyword: values[1]})), hu() + 100)
    if values[0] is not None:
        assert_whole(read_dicom(series, {keyword: values[0]}))
    with pytest.raises(Unfit, match=f"no slice with the {keyword} 7, but .*12 slices"):
        read_dicom(series, {keyword: 7})


def test_acquisitions_one_behind_another_are_one_volume(series: Path) -> None:
    edit(series, lambda header, i: setattr(header, "AcquisitionNumber", i // 4))
    assert_whole(read_dicom(series))


def test_monochrome1_leaves_stored_values(series: Path) -> None:
    edit(series, lambda header, _: setattr(header, "PhotometricInterpretation", "MONOCHROME1"))
    assert_whole(read_dicom(series))


def test_every_slice_has_its_own_rescaling(series: Path) -> None:
    def change(header: Dataset, i: int) -> None:
        header.RescaleSlope, header.RescaleIntercept = (2, -100 - i) if i % 2 else (1, 0)

    edit(series, change)
    raw = read_dicom(series)
    z = np.arange(SHAPE[2])
    np.testing.assert_array_equal(raw.hu(), np.where(z % 2, 2.0 * hu() - 100 - z, hu()))


def test_unsigned_and_signed_values(series: Path) -> None:
    def change(header: Dataset, i: int) -> None:
        header.PixelData = (header.pixel_array.astype(int) + 1024).astype(np.uint16).tobytes()
        header.PixelRepresentation, header.RescaleIntercept = 0, -1024

    edit(series, change)
    assert_whole(read_dicom(series))


def test_run_length_encoding(series: Path) -> None:
    edit(series, lambda header, _: header.compress(RLELossless))
    assert_whole(read_dicom(series))


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG"])
def test_lossless_compression(tmp_path: Path, compressor: str) -> None:
    image = itk.image_from_array(np.ascontiguousarray(hu().T))
    image.SetSpacing(SPACING)
    image.SetOrigin((10.0, -20.0, 30.0))
    write_dicom(image, tmp_path / "ct", compressor=compressor)
    syntax = dcmread(tmp_path / "ct" / "1_000.dcm").file_meta.TransferSyntaxUID
    assert syntax.is_compressed and (syntax == JPEG2000Lossless) == (compressor == "JPEG2000")
    assert_whole(read_dicom(tmp_path / "ct"))


def enhanced(folder: Path) -> Dataset:
    """The series as one enhanced file, whose frames are in the reverse order of place."""
    paths = sorted(folder.glob("1_*.dcm"))[::-1]
    headers = [dcmread(path) for path in paths]
    whole = headers[0]
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames = len(headers)
    whole.PixelData = b"".join(header.PixelData for header in headers)

    def group(**items: object) -> Sequence:
        part = Dataset()
        part.update(items)
        return Sequence([part])

    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence = group(PixelSpacing=whole.PixelSpacing)
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=whole.ImageOrientationPatient)
    for header in headers:
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=header.ImagePositionPatient)
        frame.PixelValueTransformationSequence = group(RescaleSlope=1, RescaleIntercept=0)
        frames.append(frame)
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        del whole[keyword]
    del whole["RescaleIntercept"]
    for path in paths:
        path.unlink()
    return whole


def test_enhanced_multiframe(series: Path) -> None:
    whole = enhanced(series)
    whole.save_as(series / "enhanced.dcm")
    assert_whole(read_dicom(series))
    whole.NumberOfFrames = 6
    whole.save_as(series / "enhanced.dcm")
    with pytest.raises(Unfit, match="enhanced.dcm cannot be read"):
        read_dicom(series)
    whole.NumberOfFrames = 12
    del whole.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    whole.save_as(series / "enhanced.dcm")
    with pytest.raises(Unfit, match="no ImagePositionPatient in 1 of 12 slices"):
        read_dicom(series)


def test_the_reader_of_configs_chooses_too(series: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(series, lambda header, i: setattr(header, "SeriesInstanceUID", f"1.2.{i % 2}"))
    edit(series, lambda header, i: setattr(header, "SeriesNumber", i % 2 + 1))
    with pytest.raises(ValueError, match=r"holds 2 readable DICOM series, SeriesNumber 1 \(6 slices\), 2 \(6 slices\)"):
        LoadCTd("image")({"image": series})
    image = LoadCTd("image", dicom_select={"SeriesNumber": 2})({"image": series})["image"]
    np.testing.assert_array_equal(image.numpy()[0], hu()[..., 1::2].astype(np.float32))
    assert image.pixdim.tolist() == [2.0, 2.5, 6.0] and logging.WARNING not in {r.levelno for r in caplog.records}


def test_a_slice_that_ends_its_decompressor_is_named(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GDCM aborts by some damaged JPEG 2000 files; here, the process is ended by hand."""
    edit(series, lambda header, _: header.compress(RLELossless))
    program = series.parent / "decompress.py"
    program.write_text(
        "import os, sys, custom_components.data.decompress as d\nd.pixel_array = lambda name: os.abort()\nd.main()"
    )
    monkeypatch.setattr(decompress, "__file__", str(program))
    with pytest.raises(Unfit, match=f"{series}/1_000.dcm cannot be read .its decompression ends its process"):
        read_dicom(series)
