"""Prompt encoders: unit vectors by meaning, from any folder; embeddings are computed once."""

import json
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel

from common.errors import UserError
from common.hub import PAPER_ENCODER, minilm_folder
from router import MAX_PROMPT_CHARACTERS, PromptEncoder

PROMPTS = ["a giraffe", "an elephant in the savanna", "a slice of pizza", "the japan flag"]


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder("minilm")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder as sentence-transformers publishes it: a tiny BERT, mean of tokens, normalised."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("encoder") / "small"
    shutil.copytree(
        minilm_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "onnx")
    )
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=30522, intermediate_size=24, **size)).save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    settings = json.loads(pooling.read_text())
    for key in ("word_embedding_dimension", "embedding_dimension"):
        settings |= {key: 24} if key in settings else {}
    pooling.write_text(json.dumps(settings))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_home_that_nobody_has_is_one_line():
    with pytest.raises(UserError, match=r"~no-such-user/encoder is unknown.*minilm"):
        PromptEncoder("~no-such-user/encoder")


def test_near_means_alike(encoder):
    z = encoder(PROMPTS)
    assert z.shape == (4, 384) and z.dtype == torch.float32
    assert torch.allclose(z.norm(dim=-1), torch.ones(4), atol=1e-5)
    near, far = z[0] @ z[1], z[0] @ z[3]
    assert near > far


def test_it_does_not_care_about_the_batch(encoder):
    together, alone = encoder(PROMPTS), torch.cat([encoder([p]) for p in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_folder_gives_the_mean_of_its_tokens_states(small):
    """By hand, with transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(small), BertModel.from_pretrained(small).eval()
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state  # (4, tokens, 24)
    mask = tokens.attention_mask[:, :, None]
    mean = (states * mask).sum(1) / mask.sum(1)
    assert torch.allclose(PromptEncoder(str(small))(PROMPTS), F.normalize(mean, dim=-1), atol=1e-5)


def test_embeddings_are_fresh_ones_kept(cache, small, monkeypatch):
    captions = [f"{prompt}, number {k}" for k in range(60) for prompt in PROMPTS]
    encoder = PromptEncoder(str(small))
    z = encoder.embeddings(captions)
    assert z.shape == (240, 24)
    assert torch.allclose(z, encoder(captions), atol=1e-6)

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(SentenceTransformer, "encode", fail)
    assert torch.equal(PromptEncoder(str(small)).embeddings(captions), z)
    with pytest.raises(AssertionError, match="computed again"):
        encoder.embeddings([*captions[:-1], "another"])
    with pytest.raises(AssertionError, match="computed again"):
        encoder.embeddings(captions[::-1])


def test_another_encoder_has_its_own_embeddings(cache, small, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(small, other)
    moved = tmp_path / "moved"
    shutil.copytree(small, moved)
    torch.manual_seed(4)
    BertModel(BertConfig.from_pretrained(small)).save_pretrained(other)
    monkeypatch.chdir(tmp_path)
    assert PromptEncoder("other").name == str(other) and PromptEncoder("minilm").name == "minilm"
    first, second, third = (PromptEncoder(str(path)) for path in (small, other, moved))
    assert first.fingerprint == third.fingerprint != second.fingerprint
    z = first.embeddings(PROMPTS)
    assert not torch.allclose(second.embeddings(PROMPTS), z, atol=1e-3)
    assert torch.equal(third.embeddings(PROMPTS), z)
    assert len(list((cache / "aptp").iterdir())) == 2


def test_a_prompt_is_cut_before_it_is_read(small):
    encoder = PromptEncoder(str(small))
    far = " " * MAX_PROMPT_CHARACTERS + "a giraffe"
    assert torch.allclose(encoder([far]), encoder([""]), atol=1e-6)
    assert torch.allclose(encoder([far[1:]]), encoder(["a"]), atol=1e-6)


def test_what_is_not_here_says_how_to_get_it(tmp_path):
    for name in (PAPER_ENCODER, "nobody/nothing"):
        with pytest.raises(UserError, match=f"hf download {name} --local-dir D.*minilm") as caught:
            PromptEncoder(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no-such-model"):
        PromptEncoder("/no/no-such-model")
    with pytest.raises(UserError, match=r"unknown.*minilm"):
        PromptEncoder("mpnet")


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def own_code(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "mine.py").write_text("raise SystemExit('code of the model was run')")
    modules[0]["type"] = "mine.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))


FAULTS = {
    "no weights": (remove("model.safetensors"), "could not be loaded"),
    "no config": (remove("config.json"), "could not be loaded"),
    "cut short": (truncate, "could not be loaded"),
    "pickled": (pickle, "pytorch_model.bin is a pickle"),
    "code of its own": (own_code, "needs code of its own.*mine.Transformer"),
    "no types": (lambda folder: (folder / "modules.json").write_text("[{}]"), "no list of mod"),
    "modules": (lambda folder: (folder / "modules.json").write_text("{"), "modules.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_one_line(small, tmp_path, fault):
    folder = tmp_path / "encoder"
    shutil.copytree(small, folder)
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        PromptEncoder(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
