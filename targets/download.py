"""Official files of `coco` and `cc3m`, downloaded so that a stopped download can go on. App. E.1.

A file is received as `NAME.part` and gets its name once its SHA-256 is right, so a file of that
name is whole. A server that supports HTTP Range is asked only for the rest of a file. Archives are
unpacked file by file, each under a temporary name first; files that already have the right size are
left alone. At the end `NAME.json`, a list of its content, replaces the archive; the next call reads
from it whether anything is missing.

Sizes and hashes are those that TensorFlow Datasets (`url_checksums/coco.txt`) and Hugging Face
Datasets (`conceptual_captions/dataset_infos.json`) publish for these addresses.
"""

from __future__ import annotations

import hashlib
import http.client
import shlex
import shutil
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from common.errors import UserError
from common.files import read_json, replacing, write_json

CHUNK = 2**20
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # in a row without progress


@dataclass(frozen=True)
class RemoteFile:
    """A published file, its place in the data folder, and which of its members are wanted."""

    url: str
    name: str
    size: int  # bytes
    sha256: str
    members: str | None = None  # start of the wanted names of a zip; None: not an archive


COCO_HOST, CC3M_HOST = "http://images.cocodataset.org", "https://storage.googleapis.com/gcc-data"

FILES = {
    "coco": (
        RemoteFile(
            f"{COCO_HOST}/annotations/annotations_trainval2014.zip",
            "annotations_trainval2014.zip",
            252_872_794,
            "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
            "annotations/captions_",
        ),
        RemoteFile(
            f"{COCO_HOST}/zips/val2014.zip",
            "val2014.zip",
            6_645_013_297,
            "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
            "val2014/",
        ),
        RemoteFile(
            f"{COCO_HOST}/zips/train2014.zip",
            "train2014.zip",
            13_510_573_713,
            "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
            "train2014/",
        ),
    ),
    "cc3m": (
        RemoteFile(
            f"{CC3M_HOST}/Validation/GCC-1.1.0-Validation.tsv",
            "Validation_GCC-1.1.0-Validation.tsv",
            2_603_670,
            "528a0c939ec2ad8d1740bd3f459a51e9fe67643050e29f68fabb6da3f8ac985d",
        ),
        RemoteFile(
            f"{CC3M_HOST}/Train/GCC-training.tsv",
            "Train_GCC-training.tsv",
            564_607_502,
            "eab84e5ebc713a41a6b1f6ae6fa3d6617821a13b03fe24e16004cc4aac189635",
        ),
    ),
}

CC3M_IMAGES = """\
The images lie on three million servers; img2dataset (pip install img2dataset) fetches them:
  (printf 'caption\\turl\\n'; cat {data_dir}/{tsv}) > {data_dir}/{split}.tsv && img2dataset \
--input_format tsv --url_list {data_dir}/{split}.tsv --url_col url --caption_col caption \
--image_size 256 --resize_mode keep_ratio --output_format webdataset \
--output_folder {data_dir}/{split}"""


def download(target: str, data_dir: Path) -> None:
    """Download the official files of `target` to `data_dir`, as far as they are missing.

    Raises:
        UserError: no connection, no room, or not the published file.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    for remote in FILES[target]:
        path, contents = data_dir / remote.name, data_dir / f"{remote.name}.json"
        if remote.members is None:
            if not path.exists():
                fetch(remote, path)
        else:
            if not unpacked(contents, data_dir):
                if not path.exists():
                    fetch(remote, path)
                write_json(contents, unpack(path, data_dir, remote.members))
            path.unlink(missing_ok=True)
        print(f"{remote.name}: complete")
    if target == "cc3m":
        for remote, split in zip(FILES["cc3m"], ("validation", "train"), strict=True):
            place = shlex.quote(str(data_dir))
            print(CC3M_IMAGES.format(data_dir=place, tsv=remote.name, split=split))


def fetch(remote: RemoteFile, path: Path) -> None:
    """Download one file to `path`, from where `path`.part ends."""
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.exists() else 0
    room, needed = shutil.disk_usage(path.parent).free, remote.size - have
    needed += remote.size if remote.members else 0  # images are as large unpacked
    if room < needed:
        raise UserError(
            f"{remote.name} needs {needed / 1e9:.1f} GB in {path.parent.resolve()}, which has room "
            f"for {room / 1e9:.1f} GB; free some, or give another --data-dir"
        )
    attempts = 0
    bar = tqdm(
        total=remote.size, initial=have, desc=remote.name, unit="B", unit_scale=True, miniters=1
    )
    with bar:
        while have < remote.size:
            problem: Exception | None = None
            try:
                receive(remote, part, have, bar)
            except HTTPError as error:
                if error.code < 500:
                    raise UserError(f"{remote.url} answers {error.code} {error.reason}") from None
                problem = error
            except (URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                problem = error
            before, have = have, part.stat().st_size if part.exists() else 0
            attempts = 0 if have > before else attempts + 1
            if attempts == ATTEMPTS:
                raise UserError(
                    f"{remote.url} cannot be reached or stops sending ({problem or 'no data'}); "
                    f"run the same command again to go on"
                )
            if have < remote.size:
                time.sleep(2**attempts - 1)
    if have != remote.size or sha256(part) != remote.sha256:
        part.unlink()
        raise UserError(
            f"{remote.url} sent {have:,} bytes that are not the published file (SHA-256 "
            f"{remote.sha256[:12]}..., {remote.size:,} bytes); they are deleted: try again"
        )
    part.replace(path)


def receive(remote: RemoteFile, part: Path, have: int, bar: tqdm) -> None:
    """Append what the server sends from byte `have` on; start over where it sends everything."""
    headers = {"User-Agent": "aptp"} | ({"Range": f"bytes={have}-"} if have else {})
    with urlopen(Request(remote.url, headers=headers), timeout=TIMEOUT) as response:
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not (response.status == 206 and goes_on):
            have = 0
        bar.n = have
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
                if have > remote.size:  # not the published file
                    break


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    bar = tqdm(total=path.stat().st_size, desc=f"checking {path.stem}", unit="B", unit_scale=True)
    with bar, path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def unpacked(contents: Path, folder: Path) -> bool:
    """Whether all files that `contents` lists, name to size, are in `folder`."""
    try:
        sizes = read_json(contents)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (UserError, FileNotFoundError):  # not there, or damaged
        return False


def unpack(path: Path, folder: Path, start: str) -> dict[str, int]:
    """Unpack a zip's files whose names start with `start` into `folder`; gives name to size.

    Raises:
        UserError: it is damaged, or a name leads out of the folder.
    """
    sizes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = [i for i in archive.infolist() if i.filename.startswith(start)]
            for info in tqdm(wanted, desc=f"unpacking {path.name}", unit="file"):
                name, target = info.filename, folder / info.filename
                if ".." in PurePosixPath(name).parts or "\\" in name:
                    raise UserError(f"{path} holds {name!r}, which leads out of its folder")
                if info.is_dir():
                    continue
                sizes[name] = info.file_size
                if target.exists() and target.stat().st_size == info.file_size:
                    continue
                with (
                    replacing(target) as temporary,
                    temporary.open("wb") as file,
                    archive.open(info) as member,  # whose CRC is checked at its end
                ):
                    shutil.copyfileobj(member, file, CHUNK)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it and run the command again"
        ) from None
    return sizes
