"""Targets by name; images decoded whatever they are; the unreadable skipped with their captions."""

import errno
import io
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from small_data import BROKEN, make_coco, make_folder, number_in, picture, write
from torchvision.transforms.v2 import functional as vision

from common.errors import UserError
from targets import __main__ as command
from targets import images as module
from targets.images import CaptionedImages, Unreadable, decode, load_target, spread


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


# ---- one image ----


@pytest.mark.parametrize("size", [(64, 48), (37, 90), (256, 256)])
def test_resized_and_cropped_as_torchvision_does(size):
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = coarse.resize(size, Image.Resampling.BICUBIC)
    expected = vision.center_crop(vision.resize(smooth, 32, vision.InterpolationMode.BICUBIC), 32)
    difference = np.asarray(expected).astype(int) - decode(encoded(smooth, "PNG"), 32)
    assert np.abs(difference).mean() < 4  # where the crop falls differs by half a pixel at most


def test_shrinking_averages_instead_of_picking():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(decode(encoded(Image.fromarray(stripes), "PNG"), 32).astype(int) - 127).max() <= 8


def test_a_large_jpeg_looks_the_same_at_a_fraction():
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    large = coarse.resize((1600, 1200), Image.Resampling.BICUBIC)
    exact = decode(encoded(large, "PNG"), 64).astype(int)
    assert np.abs(exact - decode(encoded(large, "JPEG", quality=95), 64)).mean() < 3


ORIENTATIONS = {  # the picture as stored -> as it is meant, from the definition of the EXIF tag
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_followed(orientation, kind):
    quarters = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    stored = np.kron(quarters, np.ones((32, 32, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(stored), kind, exif=exif)
    got = decode(file, 64)[16::32, 16::32]  # a pixel of each quarter
    assert np.abs(got.astype(int) - ORIENTATIONS[orientation](quarters)).max() <= 8


def test_transparency_is_put_on_white():
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:8] = (200, 40, 0, 255)
    rgba[8:] = (200, 40, 0, 51)  # a fifth of it, four fifths of white
    got = decode(encoded(Image.fromarray(rgba), "PNG"), 16)
    assert np.abs(got[0, 0].astype(int) - (200, 40, 0)).max() <= 1
    assert np.abs(got[-1, 0].astype(int) - (244, 212, 204)).max() <= 1

    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([200, 40, 0, 10, 20, 30])
    palette.paste(1, (0, 8, 16, 16))
    got = decode(encoded(palette, "PNG", transparency=1), 16)
    assert got[0, 0].tolist() == [200, 40, 0] and got[-1, 0].tolist() == [255, 255, 255]

    grey = Image.merge("LA", (Image.new("L", (16, 16), 100), Image.new("L", (16, 16), 0)))
    assert decode(encoded(grey, "PNG"), 16).min() == 255


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        got = decode(file, 8).reshape(-1, 3).mean(0)
        assert np.abs(got - (255, 0, 0)).max() <= 4, kind


def test_a_cmyk_jpeg():
    file = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode(file, 8).reshape(-1, 3).mean(0) - (255, 0, 0)).max() <= 6


def test_sixteen_bits_keep_their_upper_eight():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    got = decode(encoded(Image.fromarray(ramp), "PNG"), 64)
    assert np.array_equal(got, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, 2))
    assert np.array_equal(got, decode(encoded(Image.fromarray(ramp), "TIFF"), 64))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_look_like_their_rgb(mode):
    image = Image.radial_gradient("L").convert("RGB").convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode(encoded(image, "PNG"), 256), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_and_thin_images(size):
    got = decode(encoded(Image.new("RGB", size, (9, 99, 199)), "PNG"), 16)
    assert got.shape == (16, 16, 3) and np.abs(got.astype(int) - (9, 99, 199)).max() <= 1


def png_of(width: int, height: int, mode: bytes = b"\x01\x00") -> bytes:
    """A PNG whose header promises so many pixels (one bit each), without them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">II", width, height) + mode + b"\x00\x00\x00"
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [50_000, 10_000])  # Pillow refuses one and would load the other
def test_an_enormous_image_takes_no_memory(side, tmp_path, monkeypatch):
    write(tmp_path / "0.png", png_of(side, side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with (tmp_path / "0.png").open("rb") as file, pytest.raises(Exception, match=r"pixels"):
        decode(file, 64)


def test_no_format_that_runs_other_programs():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(Image.UnidentifiedImageError):
        decode(io.BytesIO(postscript), 8)


# ---- skipping ----


def numbered(pictures: list[int], broken: set[int]) -> CaptionedImages:
    """Rows that show these pictures, 1 x 1, some unreadable; a pixel's red is the picture."""

    def read(row: int) -> np.ndarray:
        if pictures[row] in broken:
            raise Unreadable(f"picture {pictures[row]}: no")
        return np.full((1, 1, 3), pictures[row], np.uint8)

    empty = [""] * len(pictures)
    captions = [f"{k}" for k in pictures]
    return CaptionedImages("test", captions, empty, empty, np.array(pictures), read)


@given(
    pictures=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    broken=st.sets(st.integers(0, 9)),
    asked=st.lists(st.integers(0, 29), min_size=1, max_size=12),
    ahead=st.integers(0, 3),
)
def test_an_unreadable_row_gives_way_to_the_next_readable_one(pictures, broken, asked, ahead):
    data, rows = numbered(pictures, broken), len(pictures)
    asked = [row % rows for row in asked]
    if not set(pictures) - broken:
        with pytest.raises(UserError, match=r"none of the images of test"):
            data.batch(asked)
        return
    expected = []
    for row in asked:
        while pictures[row] in broken:
            row = (row + 1) % rows
        expected.append(row)
    batches = [asked, asked[::-1], torch.tensor(asked)]
    for (images, used), rows_then in zip(
        data.batches(batches, ahead), (expected, expected[::-1], expected), strict=True
    ):
        assert used.tolist() == rows_then
        assert ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [
            float(data.captions[row]) for row in rows_then
        ]
    assert set(data.skipped) <= broken


def test_images_are_of_exactly_the_rows_asked_for():
    data = numbered([0, 1, 2, 3], {2})
    assert ((data.images([3, 0])[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [3, 0]
    with pytest.raises(UserError, match=r"picture 2: no"):
        data.images([1, 2])


def test_giving_up_when_hardly_anything_can_be_read():
    data = numbered([k % 250 for k in range(5000)], set())
    calls = []

    def read(row: int) -> np.ndarray:
        calls.append(row)
        raise Unreadable(f"row {row}")

    hopeless = CaptionedImages(
        "x", data.captions, data.groups, data.styles, np.arange(len(data)), read
    )
    with pytest.raises(UserError, match=r"from row 7 on.*row 7"):
        hopeless.batch([7])
    assert len(calls) == module.MAX_ATTEMPTS


def test_a_fault_of_the_machine_is_not_the_images(tmp_path, monkeypatch):
    make_coco(tmp_path)
    data = load_target("coco", "train", data_dir=tmp_path)

    def no_handles(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "decode", no_handles)
    with pytest.raises(OSError, match="Too many"):
        data.batch([0])
    assert not data.skipped


def test_broken_files_are_skipped_and_counted_with_captions_in_place(tmp_path):
    make_coco(tmp_path, images=12, captions=2)
    names = sorted((tmp_path / "train2014").iterdir())
    write(names[2], BROKEN)
    write(names[3], b"")
    write(names[4], picture(4, (400, 300))[:-900])  # cut short
    write(names[5], png_of(50_000, 50_000))
    names[7].unlink()
    data = load_target("coco", "train", data_dir=tmp_path, resolution=16)
    assert len(data) == 22 and data.notes == {"image missing": 2}
    images, rows = data.batch(range(len(data)))
    assert images.shape == (22, 3, 16, 16) and images.dtype == torch.float32
    shown = [number_in(image) for image in images]
    assert [data.captions[row].split(",")[0] for row in rows] == [f"picture {k}" for k in shown]
    assert shown == [int(data.captions[row].split()[1].strip(",")) for row in rows]
    assert set(shown) == {0, 1, 6, 8, 9, 10, 11} and shown[2:6] == [6, 6, 6, 6]
    assert set(data.skipped) == {2, 3, 4, 5}
    report = data.report()
    assert "4 unreadable images skipped" in report and "image missing: 2" in report
    assert "train2014/COCO_train2014_000000000002.jpg" in report and "\n" not in report
    assert "pixels" in data.skipped[5]


def test_pictures_say_which_rows_show_the_same(tmp_path):
    make_coco(tmp_path, images=3, captions=4)
    data = load_target("coco", "train", data_dir=tmp_path)
    assert data.pictures.tolist() == [int(caption.split()[1][:-1]) for caption in data.captions]
    assert Counter(data.pictures.tolist()) == {0: 4, 1: 4, 2: 4}


# ---- a target by name ----


def test_limit_takes_rows_spread_over_the_target():
    everything, few = load_target("emoji", "train"), load_target("emoji", "train", limit=10)
    assert len(few) == 10 and set(few.captions) <= set(everything.captions)
    row = everything.captions.index(few.captions[7])
    assert np.array_equal(few.read(7), everything.read(row))
    assert few.pictures[7] == everything.pictures[row]
    assert len(set(few.groups)) > 3


@given(st.integers(1, 50), st.none() | st.integers(1, 60))
def test_spread(rows, limit):
    got = spread(rows, limit)
    assert len(got) == min(rows, limit or rows) and sorted(set(got)) == got
    assert got[0] == 0 and got[-1] < rows
    assert max(np.diff([*got, rows])) - min(np.diff([*got, rows])) <= 1


def test_unknown_target(tmp_path):
    with pytest.raises(UserError, match=r"imagenet.*emoji"):
        load_target("imagenet", "train")
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match="unknown"):
        load_target(str(tmp_path / "file"), "train")


@pytest.mark.parametrize("target", ["coco", "cc3m"])
def test_missing_data_is_one_helpful_line(target, tmp_path):
    with pytest.raises(UserError, match=rf"python data\.py {target} --download.*emoji needs noth"):
        load_target(target, "train")
    with pytest.raises(UserError) as refused:
        load_target(target, "train", data_dir=tmp_path)
    line = str(refused.value)
    assert "\n" not in line and str(tmp_path) in line and "emoji needs nothing" in line
    assert f"`python data.py {target} --download --data-dir {tmp_path}`" in line
    assert {"coco": "annotations/captions_train2014.json", "cc3m": "training.tsv"}[target] in line


# ---- python data.py ----


def run(monkeypatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["targets", *map(str, arguments)])
    command.main()


def test_the_command_line_describes_a_target(tmp_path, monkeypatch, capsys):
    make_coco(tmp_path, images=12, captions=2)
    write(tmp_path / "train2014" / "COCO_train2014_000000000005.jpg", BROKEN)
    run(monkeypatch, "coco", "--data-dir", tmp_path)
    out = capsys.readouterr().out
    assert "train: 12 images, e.g. 'picture 0, caption 0'" in out
    assert "read 12 of them; coco: 24 rows; 1 unreadable image skipped" in out
    assert "validation: 3 images" in out
    monkeypatch.setattr(command, "QUICK_CHECK", 4)
    run(monkeypatch, "coco", "--data-dir", tmp_path)
    assert "read 4 of them; coco: 24 rows; 0 unreadable" in capsys.readouterr().out
    run(monkeypatch, "coco", "--data-dir", tmp_path, "--verify")
    out = capsys.readouterr().out
    assert "read 12 of them" in out and "unreadable: train2014/COCO_train2014_000000000005" in out


def test_the_command_line_describes_a_folder(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "mine", [(f"{k}.jpg", f"picture {k}") for k in range(40)])
    run(monkeypatch, tmp_path / "mine")
    assert "mine: " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["emoji"], ["coco"], ["."]])
def test_nothing_to_download(arguments, monkeypatch):
    with pytest.raises(UserError, match=r"coco, cc3m.*--data-dir"):
        run(monkeypatch, *arguments, "--download")
