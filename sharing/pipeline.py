"""Stable Diffusion and SDXL with an expert for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput


@dataclass
class RoutedOutput(BaseOutput):
    """Images in the prompts' order, and the number of the expert that made each of them."""

    images: Any
    experts: list[int]


class Routed:
    """What routing adds to a pipeline whose U-Net is a mixture (`RoutedUNet`)."""

    router: Any
    unet: Any
    config: Any

    def expert(self, number: int) -> Any:
        """An expert's U-Net, for any other pipeline.

        It is loaded when it is first asked for, alone; `pipe.unet.load()` loads all of them.
        """
        return self.unet.expert(number)

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The expert of each prompt."""
        return self.router.route(prompts)

    def load_ip_adapter(self, *args: Any, **options: Any) -> None:
        """Raises ValueError."""
        raise ValueError("an IP-Adapter fits the teacher's attentions, and experts have fewer")

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        experts: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Generate images, as the pipeline does that this one extends.

        Args:
            prompt: one, or several.
            experts: one for all prompts or one for each; the router chooses if absent.
            num_images_per_prompt: images in a row of each prompt.
            num_inference_steps, guidance_scale: those that suit the model if absent.
            options: all that the pipeline takes beside these.

        Raises:
            ValueError: there is no text to route, or no such expert.
        """
        if prompt is None and experts is None:
            raise ValueError("there is no text to route; give prompt, or experts=")
        prompts = [prompt] if isinstance(prompt, str) else prompt and list(prompt)
        count = len(options["prompt_embeds"] if prompts is None else prompts)
        experts = self.route(prompts or []) if experts is None else experts
        experts = [experts] * count if isinstance(experts, int) else list(experts)
        last = self.unet.config.num_experts - 1
        if len(experts) != count or not all(0 <= i <= last for i in experts):
            raise ValueError(f"experts {experts} must be {count} numbers from 0 to {last}")
        rows = [i for i in experts for _ in range(num_images_per_prompt)]
        self.unet.rows = rows
        own = self.config
        images = super().__call__(  # type: ignore[misc]
            prompts,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps or own.num_inference_steps,
            guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
            return_dict=False,
            **options,
        )[0]
        return RoutedOutput(images=images, experts=rows) if return_dict else (images, rows)


# diffusers reads components and settings off the parameters of `__init__`: those without a default
# are components, and one with a type would be held against it, which a mixture is not


class RoutedPipeline(Routed, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x."""

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        router,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        guidance_scale=7.5,
        num_inference_steps=25,
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_modules(router=router)
        self.register_to_config(
            guidance_scale=guidance_scale, num_inference_steps=num_inference_steps
        )


class RoutedXLPipeline(Routed, StableDiffusionXLPipeline):
    """SDXL."""

    def __init__(
        self,
        vae,
        text_encoder,
        text_encoder_2,
        tokenizer,
        tokenizer_2,
        unet,
        scheduler,
        router,
        image_encoder=None,
        feature_extractor=None,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
        guidance_scale=5.0,
        num_inference_steps=25,
    ):
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
        )
        self.register_modules(router=router)
        self.register_to_config(
            guidance_scale=guidance_scale, num_inference_steps=num_inference_steps
        )
