"""U-Nets that were cut, as diffusers loads them: one expert, or a mixture of them.

`kept` says what is left of each layer that was cut, by its path: a string with a 1 for each unit
that stays and a 0 for each that does not. A unit is a GroupNorm group of a ResBlock, a head of an
attention, or a slice of a feed-forward; a string without a 1 means that the layer is gone.

A LoRA of the dense U-Net is sliced as the weights are: rows of `lora_B` where a layer writes
channels that were cut, columns of `lora_A` where it reads them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING as WEIGHT_RULES
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

Kept = dict[str, str]
Cuts = dict[str, tuple[Tensor | None, Tensor | None]]


class SkippedResnet(nn.Module):
    """Takes a removed ResBlock's place and passes its input on, in a decoder without F_skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input_tensor[:, : self.channels]


class SkippedTransformer(nn.Module):
    """Takes a removed Transformer's place and passes its input on."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (hidden_states,)


def find_cuts(unet: UNet2DConditionModel, kept: Kept) -> Cuts:
    """Which rows and which columns of a dense U-Net's weights stay, by module; None for all."""
    cuts: Cuts = {}
    for name, units in kept.items():
        if "1" not in units:
            continue
        layer = unet.get_submodule(name)
        if isinstance(layer, ResnetBlock2D):
            reader, writers = "conv2", ["conv1", "norm2"]
            writers += ["time_emb_proj"] if layer.time_emb_proj is not None else []
        elif isinstance(layer, Attention):
            reader, writers = "to_out.0", ["to_q", "to_k", "to_v"]
        else:
            reader, writers = "net.2", ["net.0.proj"]
        width = layer.get_submodule(reader).weight.shape[1]
        is_open = torch.tensor([unit == "1" for unit in units], device="cpu")
        channels = is_open.repeat_interleave(width // len(units)).nonzero().flatten()
        cuts[f"{name}.{reader}"] = None, channels
        for writer in writers:  # one that is twice as wide writes two values for each channel
            parts = layer.get_submodule(writer).weight.shape[0] // width
            rows = torch.cat([channels + part * width for part in range(parts)])
            cuts[f"{name}.{writer}"] = rows, None
    return cuts


def cut(unet: UNet2DConditionModel, kept: Kept, cuts: Cuts) -> None:
    """Cut a dense U-Net's modules to the shape that `kept` says, in place."""
    for path, (rows, columns) in cuts.items():
        module: Any = unet.get_submodule(path)
        for axis, index in enumerate((rows, columns)):
            for name in ("weight", "bias") if axis == 0 else ("weight",):
                old = getattr(module, name)
                if index is not None and old is not None:
                    new = old.detach().index_select(axis, index.to(old.device))
                    setattr(module, name, nn.Parameter(new, old.requires_grad))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
    for name, units in kept.items():
        layer: Any = unet.get_submodule(name)
        left = units.count("1")
        if not left:
            is_resnet = isinstance(layer, ResnetBlock2D)
            parent, _, child = name.rpartition(".")
            empty = SkippedResnet(layer.out_channels) if is_resnet else SkippedTransformer()
            unet.get_submodule(parent)[int(child)] = empty
        elif isinstance(layer, ResnetBlock2D):
            layer.norm2.num_groups, layer.norm2.num_channels = left, layer.norm2.weight.shape[0]
        elif isinstance(layer, Attention):
            layer.heads = layer.sliceable_head_dim = left
            layer.inner_dim = layer.inner_kv_dim = layer.to_q.out_features


def init_keys(_: Any) -> set[str]:
    """What a configuration may hold: what the dense U-Net's may, and `kept`."""
    return {*inspect.signature(UNet2DConditionModel.__init__).parameters, "kept"}


class PrunedUNet2DConditionModel(UNet2DConditionModel):
    """An expert: a U-Net of the dense configuration, cut to what `kept` says.

    It takes the dense U-Net's LoRAs, by `load_lora_adapter` or a pipeline's `load_lora_weights`.
    """

    _get_init_keys = staticmethod(init_keys)

    def __init__(self, *args: Any, kept: Kept | None = None, **dense: Any) -> None:
        super().__init__(*args, **dense)
        self.register_to_config(kept=kept or {})
        weights = {path: getattr(module, "weight", None) for path, module in self.named_modules()}
        self.dense = {path: w.shape for path, w in weights.items() if w is not None and w.ndim > 1}
        self.removed = tuple(f"{name}." for name, units in (kept or {}).items() if "1" not in units)
        self.cuts = find_cuts(self, kept or {})
        cut(self, kept or {}, self.cuts)

    def slice_lora(self, adapter: dict[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
        """What is left of a LoRA of the dense U-Net.

        Args:
            adapter: its state dict.
            prefix: of the names that belong to the U-Net; the others are left out.

        Raises:
            ValueError: it is no LoRA, or one of another U-Net.
        """
        start = f"{prefix}." if prefix else ""
        own = {key: value for key, value in adapter.items() if key.startswith(start)}
        if own and not any("lora_A" in key for key in own):
            own = convert_unet_state_dict_to_peft(own)
        sliced = {}
        for key, value in own.items():
            path, _, kind = key.removeprefix(start).partition(".lora_")
            shape = self.dense.get(path)
            axis = {"A.weight": 1, "B.weight": 0, "B.bias": 0}.get(kind)
            if axis is None:
                raise ValueError(f"{key} is of no LoRA; only LoRAs (lora_A, lora_B) can be sliced")
            if shape is None:
                raise ValueError(f"this LoRA is of another model: its layer {path} is not here")
            if value.shape[axis] != shape[axis]:
                what = f"{value.shape[axis]} channels at {path}.lora_{kind}, and not {shape[axis]}"
                raise ValueError(f"this LoRA is of another model: it has {what}")
            index = self.cuts.get(path, (None, None))[axis]
            if not path.startswith(self.removed):
                sliced[key] = value if index is None else value.index_select(axis, index)
        return sliced

    def _load_ip_adapter_weights(self, *args: Any, **options: Any) -> None:
        raise ValueError("an IP-Adapter fits the teacher's attentions, and an expert has fewer")

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        **options: Any,
    ) -> None:
        """Load a LoRA of the dense U-Net. Raises ValueError where it is of another model."""
        if not isinstance(pretrained_model_name_or_path_or_dict, dict):
            raise ValueError("give a LoRA's state dict, or load it with pipe.load_lora_weights")
        if sliced := self.slice_lora(pretrained_model_name_or_path_or_dict, prefix):
            super().load_lora_adapter(sliced, prefix=prefix, **options)


# older versions of diffusers know by a class's name alone that an adapter's weight is a number
WEIGHT_RULES.setdefault(PrunedUNet2DConditionModel.__name__, lambda _, weights: weights)


def of_each(method: str) -> Callable[..., None]:
    """A method of the mixture that calls the same one of each expert that is loaded."""

    def call(self: RoutedUNet, *args: Any, **options: Any) -> None:
        for expert in self.experts.values():
            getattr(expert, method)(*args, **options)

    return call


def some_rows(value: Any, rows: Tensor, batch_size: int) -> Any:
    """Rows of whatever in `value` is a batch; the rest stays as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch_size else value
    if isinstance(value, dict):
        return {key: some_rows(part, rows, batch_size) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [some_rows(part, rows, batch_size) for part in value]
    return value


class RoutedUNet(ModelMixin, ConfigMixin):
    """Experts in one module, called as a U-Net is: each sample goes through its own expert.

    Each expert has a folder of its own, by its number, and is loaded from there when it is first
    needed: by a sample, by `expert`, or by what changes them all (a LoRA, `save_pretrained`).
    `load` loads those that are left. Until then diffusers moves and casts `place` in their stead,
    and each goes where that is.

    `rows` holds the expert of each sample. A batch of k times as many repeats it k times, as
    classifier-free guidance repeats its prompts.
    """

    config_name = "config.json"
    place: Tensor
    set_adapters, delete_adapters = of_each("set_adapters"), of_each("delete_adapters")
    fuse_lora, unfuse_lora = of_each("fuse_lora"), of_each("unfuse_lora")
    enable_lora, disable_lora = of_each("enable_lora"), of_each("disable_lora")
    unload_lora = of_each("unload_lora")

    def __init__(self, num_experts: int, **dense: Any) -> None:
        super().__init__()
        self.register_to_config(num_experts=num_experts, **dense)
        self.register_buffer("place", torch.empty(0), persistent=False)
        self.experts: Any = nn.ModuleDict()  # those that are loaded, by number
        self.folder, self.options = Path(), dict[str, Any]()
        self.rows: list[int] = []

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> RoutedUNet:
        """A mixture whose experts lie in `folder`; the options are those of each expert."""
        config = json.loads((Path(folder) / cls.config_name).read_text(encoding="utf-8"))
        unet = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
        unet.folder, unet.options = Path(folder), options
        unet.place = unet.place.to(options.get("torch_dtype") or torch.float32)
        return unet.eval()

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write all experts as `from_pretrained` reads them."""
        self.load()
        self.save_config(folder)
        for number, expert in self.experts.items():
            expert.save_pretrained(Path(folder) / number, **options)

    def load(self) -> None:
        """Load all experts."""
        for number in range(self.config.num_experts):
            self.expert(number)

    def expert(self, number: int) -> PrunedUNet2DConditionModel:
        """An expert, loaded if it was not needed before."""
        if not 0 <= number < (N := self.config.num_experts):
            raise ValueError(f"there is no expert {number}; choose 0 to {N - 1}")
        if (key := str(number)) not in self.experts:
            options = self.options | {"torch_dtype": self.place.dtype}
            expert = PrunedUNet2DConditionModel.from_pretrained(self.folder / key, **options)
            self.experts[key] = expert.to(self.place.device)
        return self.experts[key]

    @property
    def add_embedding(self) -> Any:
        """Where SDXL's pipeline looks up how many sizes the U-Net is told."""
        return self.expert(self.rows[0]).add_embedding

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters that are loaded. An expert without any of an adapter's layers has none."""
        found = [getattr(expert, "peft_config", {}) for expert in self.experts.values()]
        if not any(found):
            raise AttributeError("no adapter is loaded")
        return {name: config for one in found for name, config in one.items()}

    def load_lora_adapter(self, state_dict: Any, adapter_name: str | None = None, **options: Any):
        """Load a LoRA of the dense U-Net into every expert."""
        name = adapter_name or f"default_{len(getattr(self, 'peft_config', {}))}"
        self.load()
        for expert in self.experts.values():
            expert.load_lora_adapter(state_dict, adapter_name=name, **options)

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **inputs: Any,
    ) -> Any:
        """What `UNet2DConditionModel` gives for (B, C, h, w); only what has B rows is divided."""
        B = len(sample)
        experts = self.rows * (B // max(1, len(self.rows)))
        if len(experts) != B:
            raise ValueError(f"{B} samples, but `rows` names the experts of {len(self.rows)}")
        states = {"encoder_hidden_states": encoder_hidden_states}
        inputs |= {"sample": sample, "timestep": timestep, **states}
        output = torch.empty(0)
        for i in sorted(set(experts)):
            rows = [row for row, expert in enumerate(experts) if expert == i]
            index = torch.tensor(rows, device=sample.device)
            part = self.expert(i)(**some_rows(inputs, index, B), return_dict=False)[0]
            if not len(output):
                output = part.new_empty(B, *part.shape[1:])
            output[index] = part
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)
