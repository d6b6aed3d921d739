"""One image as pixels, whatever its kind; the unreadable found once and remembered."""

import errno
import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile
from small_data import BROKEN, jpeg, make_coco, png_of, write
from torchvision.transforms.v2 import functional as vision

from targets import decoding
from targets.decoding import CHECK_PIXELS, ImageFiles, decode, find_frame, find_unreadable
from targets.images import load_target


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


# ---- one image ----


@pytest.mark.parametrize("size", [(64, 48), (37, 90), (256, 256)])
def test_resized_and_cropped_as_torchvision_does(size):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = coarse.resize(size, Image.Resampling.BICUBIC)
    expected = vision.center_crop(vision.resize(smooth, 32, vision.InterpolationMode.BICUBIC), 32)
    difference = np.asarray(expected).astype(int) - decode(encoded(smooth, "PNG"), 32)
    assert np.abs(difference).mean() < 4  # where the crop falls differs by half a pixel at most


def test_a_large_jpeg_looks_the_same_at_a_fraction():
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
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
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_followed(orientation, kind):
    quarters = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    stored = np.kron(quarters, np.ones((32, 32, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(stored), kind, exif=exif)
    got = decode(file, 64)[16::32, 16::32]  # a pixel of each quarter
    assert np.abs(got.astype(int) - ORIENTATIONS[orientation](quarters)).max() <= 8
    file = encoded(Image.new("RGB", (40, 30)), kind, exif=exif)
    height, width, _ = ORIENTATIONS[orientation](np.zeros((30, 40, 1))).shape
    assert find_frame(file, 16)[:2] == (height, width)


def exif_of(kind: int, content: bytes, count: int) -> bytes:
    """EXIF data of one tag, orientation; types: 2 text, 3 of 16 bits, 4 of 32 bits, 5 rational."""
    inline = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack(">I", 26)
    head = b"Exif\0\0MM\0*" + struct.pack(">IHHHI", 8, 1, 0x112, kind, count)
    return head + inline + bytes(4) + (content if len(content) > 4 else b"")


SAY_NOTHING = {
    "0": exif_of(3, struct.pack(">H", 0), 1),
    "9": exif_of(3, struct.pack(">H", 9), 1),
    "65535": exif_of(3, struct.pack(">H", 65535), 1),
    "short text": exif_of(2, b"6\0", 2),
    "text": exif_of(2, b"right-top\0", 10),
    "6 / 0": exif_of(5, struct.pack(">II", 6, 0), 1),
    "empty": b"Exif\0\0",
    "no TIFF": b"Exif\0\0nonsense",
    "cut short": b"Exif\0\0MM\0*",
}


@pytest.mark.parametrize("exif", SAY_NOTHING.values(), ids=SAY_NOTHING)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientations_that_say_nothing_change_nothing(exif, kind):
    """An image is checked by its pixels, and trained on with its sizes: both read alike."""
    image = Image.linear_gradient("L").crop((0, 0, 128, 96)).convert("RGB")
    plain, odd = encoded(image, kind), encoded(image, kind, exif=exif)
    assert np.array_equal(decode(odd, 32), decode(plain, 32))
    assert find_frame(odd, 32) == find_frame(plain, 32) == (96, 128, 0, 5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [exif_of(3, struct.pack(">H", 6), 1), b""], ids=["exif", "none"])
def test_an_image_cut_short_is_unreadable(kind, exif):
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind, exif=exif).getvalue()
    with pytest.raises((OSError, SyntaxError)):
        decode(io.BytesIO(whole[: len(whole) // 2]), 32)


@pytest.mark.parametrize("size", [(400, 300), (180, 250), (64, 64), (40, 30), (1600, 900)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_frame_is_where_the_square_was_cut(size, orientation, kind):
    """An image whose pixels say where they are: red grows to the right, green downwards."""
    width, height = size
    red, green = np.linspace(0, 255, width), np.linspace(0, 255, height)
    meant = np.zeros((height, width, 3))
    meant[..., 0], meant[..., 1] = red[None], green[:, None]
    back = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # quarter turns that the orientation undoes
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.rot90(meant, back).round().astype(np.uint8))
    file = encoded(stored, kind, exif=exif)
    frame, got = find_frame(file, 64), decode(file, 64).astype(float)
    assert (frame.height, frame.width) == (height, width)
    scale = 64 / min(size)
    assert abs(got[:, 0, 0].mean() / 255 * width * scale - frame.left) <= 1.5
    assert abs(got[0, :, 1].mean() / 255 * height * scale - frame.top) <= 1.5
    assert frame.top >= 0 and frame.left >= 0 and min(frame.top, frame.left) == 0


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


# ---- the images that cannot be decoded ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aptp" / "unreadable"


class Files:
    """Numbered images in memory, some broken, and which were opened."""

    def __init__(self, broken=(), stop=None):
        self.broken, self.stop, self.opened = set(broken), stop, []
        self.files = ImageFiles(self.open, "image {}".format, lambda k: f"{k in self.broken}")

    def open(self, k):
        if len(self.opened) == self.stop:
            raise MemoryError  # as when the machine has nothing left
        self.opened.append(k)
        return io.BytesIO(BROKEN if k in self.broken else jpeg(k))

    def find(self, image_ids):
        found = find_unreadable(self.files, image_ids, "toy")
        assert all(why.startswith(f"image {k}: ") for k, why in found.items())
        return sorted(found)


@pytest.fixture
def one_by_one(monkeypatch):
    monkeypatch.setattr(decoding, "PART", 4)
    monkeypatch.setattr(decoding, "workers", lambda: 1)


def test_every_image_is_checked_once(cache):
    first, second = Files({2, 7}), Files({2, 7})
    assert first.find(range(10)) == [2, 7] and sorted(first.opened) == [*range(10)]
    assert second.find(range(10)) == [2, 7] and second.opened == []
    few = Files({2, 7})
    assert few.find([1, 2, 9]) == [2] and sorted(few.opened) == [1, 2, 9]


def test_a_stopped_check_goes_on(cache, one_by_one):
    with pytest.raises(MemoryError):
        Files({1, 9}, stop=6).find(range(11))
    rest = Files({1, 9})
    assert rest.find(range(11)) == [1, 9] and rest.opened == [*range(4, 11)]


def test_processes_share_the_check(cache, one_by_one, monkeypatch):
    shares, ends = [Files({1, 9}), Files({1, 9})], []

    def process(number, wait):
        monkeypatch.setattr(decoding, "rank", lambda: number)
        monkeypatch.setattr(decoding, "barrier", wait)
        ends.append(shares[number].find(range(11)))

    monkeypatch.setattr(decoding, "world_size", lambda: 2)
    process(0, lambda: process(1, lambda: None))  # which waits until the other one is done, too
    assert shares[0].opened == [0, 1, 2, 3, 8, 9, 10] and shares[1].opened == [4, 5, 6, 7]
    assert ends == [[1, 9], [1, 9]]


@pytest.mark.parametrize("way", ["size", "time"])
def test_a_mended_image_is_checked_again(cache, tmp_path, way):
    make_coco(tmp_path, images=6, captions=1)
    path = tmp_path / "train2014" / "COCO_train2014_000000000002.jpg"
    whole, time = path.read_bytes(), path.stat().st_mtime_ns
    write(path, BROKEN.ljust(len(whole)) if way == "time" else BROKEN)
    os.utime(path, ns=(time, time - (way == "time")))
    assert len(load_target("coco", "train", data_dir=tmp_path)) == 5
    write(path, whole)
    os.utime(path, ns=(time, time))
    assert len(load_target("coco", "train", data_dir=tmp_path)) == 6
    assert len(list((cache / "coco").iterdir())) == 2


def test_all_resolutions_share_a_check(cache, tmp_path, monkeypatch):
    make_coco(tmp_path, images=6, captions=2)
    sizes = []
    monkeypatch.setattr(decoding, "decode", lambda file, size: sizes.append(size))
    for resolution in (32, 64):
        load_target("coco", "train", data_dir=tmp_path, resolution=resolution)
    assert sizes == [CHECK_PIXELS] * 6  # an image each, and not a row


@pytest.mark.parametrize("number", ["EMFILE", "ENOMEM", "EACCES", "ESTALE", "ETIMEDOUT"])
def test_a_fault_of_the_machine_is_not_the_images(cache, tmp_path, monkeypatch, number):
    """It stops the check, and nothing about the image is kept: it may be read the next time."""
    make_coco(tmp_path)

    def fail(*_):
        raise OSError(getattr(errno, number), "no fault of the image's")

    monkeypatch.setattr(decoding, "decode", fail)
    with pytest.raises(OSError, match="no fault"):
        load_target("coco", "train", data_dir=tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not load_target("coco", "train", data_dir=tmp_path).skipped
