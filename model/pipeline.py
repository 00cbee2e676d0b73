"""Text to video with the swap-attention U-Net: a diffusers pipeline around a `SwapUNet`, Stable Diffusion's VAE and text encoder.

Shapes in names: B clips, C channels, F frames, H and W latent positions or pixels, T tokens, D text channels.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from . import pipeline_files, pipeline_inputs, pipeline_texts
from .graphs import RecordedUNet
from .pipeline_output import TextToVideoSwapPipelineOutput
from .unet import SwapUNet

__all__ = ["TextToVideoSwapPipeline", "TextToVideoSwapPipelineOutput"]

# By name; the negative prompt's is `None` without guidance.
Tensors = dict[str, Any]
StepCallback = Callable[[Any, int, torch.Tensor, Tensors], Tensors | None]
Generators = torch.Generator | list[torch.Generator]


class TextToVideoSwapPipeline(DiffusionPipeline):
    """Makes videos from texts.

    Args:
        vae: turns latents of single frames into pictures.
        text_encoder: embeds the prompt; its width is the U-Net's `cross_attention_dim`.
        tokenizer: of the text encoder.
        unet: the denoiser.
        scheduler: any of diffusers' schedulers for noise, velocity or sample prediction; none for flow matching.
        default_frames: frames of a video when none are asked for.
        default_height, default_width: of a frame, likewise, in pixels.

    Raises:
        ValueError: two components do not fit together, or the scheduler is of another kind; the message names what it has to be.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: SwapUNet,
        scheduler: KarrasDiffusionSchedulers,
        default_frames: int = 16,
        default_height: int = 192,
        default_width: int = 344,
    ) -> None:
        super().__init__()
        pipeline_inputs.check_components(vae, text_encoder, unet)
        pipeline_inputs.check_scheduler(scheduler)
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(default_frames=default_frames, default_height=default_height, default_width=default_width)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.video_processor = VideoProcessor(do_resize=False, vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale, self._guidance_rescale, self._num_timesteps, self._interrupt = 1.0, 0.0, 0, False
        self._loss_warnings = pipeline_texts.LossWarnings()
        self._recorded: RecordedUNet | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "TextToVideoSwapPipeline":
        """Load a saved pipeline from a directory or from the Hugging Face Hub, weights from safetensors only.

        From the Hub only the folders of the components that are not passed in `kwargs` are fetched. A pipeline of Stable
        Diffusion or ModelScope can be loaded with `unet=SwapUNet.from_unet2d(…)` or `unet=SwapUNet.from_unet3d(…)`.

        Args:
            pretrained_model_name_or_path: a directory with a `model_index.json`, or a Hub id such as `owner/name`.
            kwargs: as for any diffusers pipeline: `dtype`, `variant`, components and defaults by name, and for the Hub `revision`,
                `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            TypeError: an argument has a name that diffusers does not know either; the message has the nearest that it knows.
            FileNotFoundError: the name is neither a directory with a saved pipeline nor can it be fetched.
            ValueError: its U-Net is of another class, or `use_safetensors=False` asks for pickled weights.
        """
        components, defaults = cls._get_signature_keys(cls)
        pipeline_files.check_options(kwargs, {*components, *defaults})
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(
                f"use_safetensors={kwargs['use_safetensors']!r} would load pickled weights, which can run any code; "
                "convert them to safetensors (save_pretrained writes them)"
            )
        directory = pipeline_files.fetch(str(pretrained_model_name_or_path), components, kwargs)
        loaded: TextToVideoSwapPipeline = super().from_pretrained(str(directory), **kwargs)
        return loaded

    @property
    def guidance_scale(self) -> float:
        """Weight of the text against no text (or the negative prompt) in the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call evaluates the U-Net with the negative prompt, too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many evaluations of the U-Net the last call did or the running one does."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to true in a callback to leave out the remaining steps."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **settings: Any,
    ) -> None:
        """Raise what is wrong with the arguments of a call, before any work.

        Args:
            prompt, num_frames, height, width: as for `__call__`.
            settings: any other argument of `__call__`; what is left out is not checked.

        Raises:
            ValueError: names the value and what would be valid.
        """
        levels = len(self.unet.config.block_out_channels) if self.unet is not None else 1
        pipeline_inputs.check_size(*self.video_size(num_frames, height, width), self.vae_scale_factor, levels)
        texts = {name: settings.get(name) for name in ("negative_prompt", "prompt_embeds", "negative_prompt_embeds")}
        pipeline_inputs.check_texts(prompt, **texts, unet=self.unet)
        pipeline_inputs.check_settings(settings, self._callback_tensor_inputs)
        # It may have been exchanged since the pipeline was made.
        pipeline_inputs.check_scheduler(self.scheduler)
        if "num_inference_steps" in settings:
            steps = [settings.get(name) for name in ("num_inference_steps", "timesteps", "sigmas")]
            pipeline_inputs.check_steps(self.scheduler, *steps)

    def video_size(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Frames, height and width of a video; the pipeline's defaults where nothing was asked for."""
        defaults = self.config
        return (
            defaults.default_frames if num_frames is None else num_frames,
            defaults.default_height if height is None else height,
            defaults.default_width if width is None else width,
        )

    def enable_cuda_graph(self) -> None:
        """From now on replay the U-Net as a CUDA graph: the same videos, several times as fast where few are made at once.

        A graph is recorded when a size first comes. It keeps the U-Net as it is now: call this again after the U-Net was moved or
        exchanged, or has got other weights, adapters or another attention backend.

        Raises:
            ValueError: the U-Net is not on a GPU, or models are offloaded, which moves weights at every step.
        """
        if getattr(self.unet, "_hf_hook", None) is not None:
            raise ValueError(
                "a CUDA graph needs weights that stay where they are, and models are offloaded; choose one of the two"
            )
        self._recorded = RecordedUNet(self.unet)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_videos_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed prompts and negative prompts, each repeated for the videos of a prompt.

        Args:
            prompt: one or several; not needed with `prompt_embeds`.
            device: where the embeddings go; by default where the models run.
            num_videos_per_prompt: how often each is repeated, one after the other.
            do_classifier_free_guidance: whether negative prompts are embedded.
            negative_prompt: one for all, or as many as prompts; nothing (the empty text) by default.
            prompt_embeds, negative_prompt_embeds: (prompts, T, D) instead of texts.

        Returns:
            Both (prompts * num_videos_per_prompt, T, D); the second is `None` without guidance.

        Raises:
            ValueError: prompts and negative prompts differ in number or, embedded, in shape, or do not fit the U-Net.
        """
        pipeline_inputs.check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, unet=self.unet)
        device = device or self._execution_device
        prompt_embeds = self._embeddings(prompt, prompt_embeds, num_videos_per_prompt, device)
        if not do_classifier_free_guidance:
            return prompt_embeds, None
        if negative_prompt_embeds is None:
            count = len(prompt_embeds) // num_videos_per_prompt
            negative_prompt = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * count
        negative_prompt_embeds = self._embeddings(negative_prompt, negative_prompt_embeds, num_videos_per_prompt, device)
        pipeline_inputs.check_alike(prompt_embeds, negative_prompt_embeds)
        return prompt_embeds, negative_prompt_embeds

    def _embeddings(
        self, texts: str | list[str] | None, embeds: torch.Tensor | None, repeats: int, device: torch.device
    ) -> torch.Tensor:
        if embeds is None:
            texts = [texts] if isinstance(texts, str) else list(texts or ())
            self._loss_warnings.tell(texts, self.tokenizer)
            embeds = pipeline_texts.embed(texts, self.tokenizer, self.text_encoder, device)
        dtype = self.unet.dtype if self.unet is not None else embeds.dtype
        return embeds.to(device=device, dtype=dtype).repeat_interleave(repeats, dim=0)

    def prepare_latents(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise that denoising starts from, (B, C, F, height / 8, width / 8), at the deviation that the scheduler wants.

        Args:
            batch_size: videos.
            num_frames, height, width: of a video; height and width in pixels.
            dtype, device: of the latents.
            generator: one for all videos, or one for each, which makes a video independent of the others.
            latents: noise of deviation one to use instead of drawing any.

        Raises:
            ValueError: the number of generators, or the shape of `latents`, is not that of the videos.
        """
        factor = self.vae_scale_factor
        shape = (batch_size, self.unet.config.in_channels, num_frames, height // factor, width // factor)
        pipeline_inputs.check_noise(shape, generator, latents)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        noise: torch.Tensor = latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        return noise

    def decode_latents(self, latents: torch.Tensor, decode_chunk_size: int | None = 16) -> torch.Tensor:
        """Decode latents frame by frame.

        Args:
            latents: (B, C, F, H, W), of deviation one.
            decode_chunk_size: frames that the VAE decodes at once; fewer need less memory. `None`: all.

        Returns:
            Float32 (B, 3, F, 8 * H, 8 * W), about -1 to 1.
        """
        batch, frames = latents.shape[0], latents.shape[2]
        images = latents.permute(0, 2, 1, 3, 4).flatten(0, 1).to(self.vae.dtype) / self.vae.config.scaling_factor
        images = images + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        parts = torch.split(images, decode_chunk_size or len(images))
        pictures = torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in parts])
        return pictures.reshape(batch, frames, *pictures.shape[1:]).permute(0, 2, 1, 3, 4)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        decode_chunk_size: int | None = 16,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> TextToVideoSwapPipelineOutput | tuple[Any]:
        """Make videos.

        Args:
            prompt: what to show; a list for several videos.
            num_frames: frames of a video; 1 makes pictures. The pipeline's `default_frames` by default.
            height, width: in pixels, multiples of the VAE's factor (8). The pipeline's defaults by default.
            num_inference_steps: steps from noise to video.
            guidance_scale: weight of the text; up to 1 the U-Net is evaluated without the negative prompt, in half the time.
            negative_prompt: what not to show; one for all, or as many as prompts.
            num_videos_per_prompt: videos of each prompt, with noise of their own.
            guidance_rescale: 0 to 1; above 0 against overexposure by strong guidance (Lin et al. 2023, section 3.4).
            eta: noise that DDIM adds in every step, 0 to 1; other schedulers do without.
            timesteps, sigmas: the steps themselves instead of their number, for schedulers that take them.
            generator: of the noise; a list has one for every video, which then does not depend on the others in the batch.
            latents: noise instead, (B, C, F, height / 8, width / 8).
            prompt_embeds, negative_prompt_embeds: instead of the texts, (prompts, T, D), see `encode_prompt`.
            output_type: `pil`, `np`, `pt` or `latent`, see `TextToVideoSwapPipelineOutput`.
            return_dict: whether to return an object, else a tuple of the frames alone.
            decode_chunk_size: frames that the VAE decodes at once; fewer need less memory. `None`: all.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after every step; tensors in the dict that it
                returns replace those of the call.
            callback_on_step_end_tensor_inputs: which of `latents`, `prompt_embeds`, `negative_prompt_embeds` it is given.

        Raises:
            ValueError: an argument is not valid; the message names it and what would be.
        """
        asked = {name: value for name, value in locals().items() if name != "self"}
        self.check_inputs(**asked)
        self._guidance_scale, self._guidance_rescale, self._interrupt = guidance_scale, guidance_rescale, False
        device, guided = self._execution_device, self.do_classifier_free_guidance

        given = (negative_prompt, prompt_embeds, negative_prompt_embeds)
        embeds, negative_embeds = self.encode_prompt(prompt, device, num_videos_per_prompt, guided, *given)

        steps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        size = self.video_size(num_frames, height, width)
        noise = self.prepare_latents(len(embeds), *size, embeds.dtype, device, generator, latents)

        tensors = {"latents": noise, "prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
        step_settings = self._step_settings(eta, generator)
        latents = self._denoise(tensors, steps, step_settings, callback_on_step_end, callback_on_step_end_tensor_inputs)

        frames = latents if output_type == "latent" else self._pictures(latents, decode_chunk_size, output_type)
        self.maybe_free_model_hooks()
        return TextToVideoSwapPipelineOutput(frames=frames) if return_dict else (frames,)

    def _pictures(self, latents: torch.Tensor, decode_chunk_size: int | None, output_type: str) -> Any:
        video = self.decode_latents(latents, decode_chunk_size)
        return self.video_processor.postprocess_video(video, output_type=output_type)

    def _step_settings(self, eta: float, generator: Generators | None) -> dict[str, Any]:
        """The arguments of `scheduler.step` that this scheduler knows."""
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in known}

    def _denoise(
        self,
        tensors: Tensors,
        steps: torch.Tensor,
        step_settings: dict[str, Any],
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
    ) -> torch.Tensor:
        """Take every step; `tensors` are `_callback_tensor_inputs` by name, and a callback may exchange them."""
        self._num_timesteps = len(steps)
        latents: torch.Tensor = tensors["latents"]
        with self.progress_bar(total=len(steps)) as progress:
            for number, step in enumerate(steps):
                if self.interrupt:
                    continue
                prediction = self._predict(latents, step, tensors["prompt_embeds"], tensors["negative_prompt_embeds"])
                moved = self.scheduler.step(prediction, step, latents, **step_settings, return_dict=False)[0]
                # Some schedulers compute in float32 and return it.
                tensors["latents"] = moved.to(latents.dtype)
                if callback is not None:
                    seen = {name: tensors[name] for name in callback_inputs}
                    tensors.update(callback(self, number, step, seen) or {})
                latents = tensors["latents"]
                progress.update()
        return latents

    def _predict(
        self, latents: torch.Tensor, step: torch.Tensor, prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """The U-Net's prediction at one step, guided by the text."""
        texts = prompt_embeds
        if self.do_classifier_free_guidance and negative_prompt_embeds is not None:
            texts = torch.cat([negative_prompt_embeds, prompt_embeds])
            latents = torch.cat([latents, latents])
        noisy = self.scheduler.scale_model_input(latents, step)
        if self._recorded is None:
            prediction: torch.Tensor = self.unet(noisy, step, encoder_hidden_states=texts, return_dict=False)[0]
        else:
            prediction = self._recorded(noisy, step, texts)
        if texts is prompt_embeds:
            return prediction
        without, with_text = prediction.chunk(2)
        prediction = without + self.guidance_scale * (with_text - without)
        if self._guidance_rescale > 0:
            prediction = rescale_noise_cfg(prediction, with_text, guidance_rescale=self._guidance_rescale)
        return prediction
