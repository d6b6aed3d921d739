"""Small targets in the official layouts, whose images and captions tell which row they are.

Image k is one colour, `colour(k)`, and its captions begin with `picture k`. `number_in` reads k
back from decoded pixels, so that a caption beside the wrong image is noticed.
"""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

BROKEN = b"\xff\xd8\xff\xe0 this is no JPEG"


def colour(k: int) -> tuple[int, int, int]:
    return 20 + 12 * (k % 16), 20 + 12 * (k // 16 % 16), 200


def number_in(image: Tensor | np.ndarray) -> int:
    """The number of an image: (3, H, W) in [-1, 1], or (H, W, 3) uint8."""
    if isinstance(image, Tensor):
        image = (image.permute(1, 2, 0).numpy() + 1) * 127.5
    red, green, _ = image.reshape(-1, 3).mean(0)
    return round((red - 20) / 12) + 16 * round((green - 20) / 12)


def jpeg(k: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A JPEG in the colour of k."""
    file = io.BytesIO()
    Image.new("RGB", size, colour(k)).save(file, "JPEG", quality=95)
    return file.getvalue()


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


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_coco(folder: Path, images: int = 12, captions: int = 2, validation: int = 3) -> None:
    """COCO 2014: `images` in training, `validation` after them, some captions each, interleaved."""
    for year, numbers in (
        ("train2014", range(images)),
        ("val2014", range(images, images + validation)),
    ):
        names = {k: f"COCO_{year}_{k:012d}.jpg" for k in numbers}
        for k, name in names.items():
            write(folder / year / name, jpeg(k))
        notes = [
            {"id": 100 * j + k, "image_id": 1000 + k, "caption": f"picture {k}, caption {j}\n"}
            for j in range(captions)
            for k in numbers
        ]
        content = {
            "info": {"year": 2014},
            "images": [{"id": 1000 + k, "file_name": name} for k, name in names.items()],
            "annotations": notes,
        }
        write(folder / "annotations" / f"captions_{year}.json", json.dumps(content))


def make_tsv(folder: Path, rows: int = 8) -> None:
    """CC3M's TSVs and the image files that img2dataset makes of them."""
    for split, name in (
        ("train", "Train_GCC-training.tsv"),
        ("validation", "Validation_GCC-1.1.0-Validation.tsv"),
    ):
        lines = [f"picture {k} , by the sea\thttp://example.com/{k}.jpg\n" for k in range(rows)]
        write(folder / name, "".join(lines))
        for k in range(rows):
            write(folder / split / "00000" / f"{k:09d}.jpg", jpeg(k))
            write(folder / split / "00000" / f"{k:09d}.txt", f"picture {k} , by the sea")


def make_shard(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def sample(k: int) -> dict[str, bytes]:
    """A shard's files for row k, in img2dataset's order."""
    key, caption = f"{k:09d}", f"picture {k}, in a shard"
    meta = json.dumps({"key": key, "caption": caption, "status": "success"})
    return {f"{key}.jpg": jpeg(k), f"{key}.json": meta.encode(), f"{key}.txt": caption.encode()}


def make_shards(folder: Path, rows: int = 8, rows_each: int = 3) -> None:
    """CC3M as webdataset shards, training and validation alike."""
    for split in ("train", "validation"):
        for shard, start in enumerate(range(0, rows, rows_each)):
            files: dict[str, bytes] = {}
            for k in range(start, min(start + rows_each, rows)):
                files |= sample(k)
            make_shard(folder / split / f"{shard:05d}.tar", files)


def make_folder(folder: Path, rows: list[tuple[str, str]]) -> None:
    """`metadata.jsonl` of (file_name, text), and the images named `.../<k>.jpg`."""
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
    write(folder / "metadata.jsonl", "".join(lines))
    for name in {name for name, _ in rows}:
        write(folder / name, jpeg(int(Path(name).stem)))
