"""What the pipeline refuses, with the message of each error."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from videofactory.model import miniature
from videofactory.model.pipeline import TextToVideoSwapPipeline

from .model_pipelines import SMALL, TINY_UNET, make_video

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 60}, "height is 60, no multiple of 8, the VAE's factor; the nearest are 56 and 64"),
        ({"width": 113}, "width is 113, no multiple of 8, the VAE's factor; the nearest are 112 and 120"),
        ({"height": 8}, "height is 8; the model needs at least 16 pixels"),
        ({"num_frames": 0}, "num_frames is 0; it has to be at least 1"),
        ({"num_frames": 16.0}, "num_frames is 16.0, of type float; it has to be a whole number, at least 1"),
        ({"num_frames": True}, "num_frames is True, of type bool"),
        ({"height": 32.0}, "height is 32.0, of type float; it has to be a whole number, a multiple of 8 from 16 pixels on"),
        ({"width": "48"}, "width is '48', of type str"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5, of type float"),
        ({"num_videos_per_prompt": 1.0}, "num_videos_per_prompt is 1.0, of type float"),
        ({"decode_chunk_size": 2.0}, "decode_chunk_size is 2.0, of type float"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it has to be a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; it has to be a finite number"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it has to be at least 1"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"decode_chunk_size": 0}, "decode_chunk_size is 0"),
        ({"num_videos_per_prompt": None}, "num_videos_per_prompt is None, of type NoneType; it has to be a whole number"),
        ({"guidance_scale": "9"}, "guidance_scale is '9', of type str; it has to be a finite number, such as 9.0"),
        ({"guidance_scale": None}, "guidance_scale is None, of type NoneType"),
        ({"guidance_rescale": "a"}, "guidance_rescale is 'a', of type str; it has to be a number between 0 and 1"),
        ({"eta": None}, "eta is None, of type NoneType; it has to be a number between 0 and 1"),
        ({"eta": True}, "eta is True, of type bool"),
        ({"generator": 3}, r"generator is 3; it has to be a torch.Generator, such as torch.Generator\(\).manual_seed\(3\)"),
        ({"generator": [3]}, r"generator is \[3\]; it has to be a torch.Generator"),
        ({"latents": "s"}, "latents is 's', of type str; it has to be a torch.Tensor"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 3, of type int; it has to be a function"),
        ({"callback_on_step_end_tensor_inputs": None}, "callback_on_step_end_tensor_inputs is None, of type NoneType; it has"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "is 'latents', of type str; it has to be a list of names among"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it has to lie between 0 and 1"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"output_type": "gif"}, "output_type is 'gif'; it has to be one of pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["latent"]}, "holds 'latent'; a callback can be given latents, prompt_embeds"),
        ({"prompt": None}, "neither prompt nor prompt_embeds was given"),
        ({"prompt_embeds": torch.zeros(1, 24, 64)}, "both prompt and prompt_embeds were given"),
        (
            {"negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1, 24, 64)},
            "both negative_prompt and negative_prompt_emb",
        ),
        ({"prompt": 3}, "prompt is 3 of type int; it has to be a string or a list of strings"),
        ({"prompt": ["a", 3]}, r"prompt is \['a', 3\] of type list"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "2 negative prompts were given for 3 prompts"),
        ({"negative_prompt_embeds": torch.zeros(2, 24, 64)}, "negative_prompt_embeds are 2 for 1 prompts"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 24, 64), "negative_prompt_embeds": torch.zeros(1, 20, 64)},
            r"prompt_embeds have the shape \(1, 24, 64\), negative_prompt_embeds \(1, 20, 64\)",
        ),
        ({"prompt": None, "prompt_embeds": [1]}, r"prompt_embeds is \[1\], of type list; it has to be a torch.Tensor"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(24, 64)},
            r"^prompt_embeds have the shape \(24, 64\); it has to be \(prompts, tokens, 64, the U-Net's cross_attention_dim\)",
        ),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 24, 60)}, r"^prompt_embeds have the shape \(1, 24, 60\); it has to be"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 24, 64)}, r"^prompt_embeds have the shape \(0, 24, 64\)"),
        ({"negative_prompt_embeds": torch.zeros(24, 64)}, r"^negative_prompt_embeds have the shape \(24, 64\); it has to be"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators were given for 1 videos"),
        (
            {"latents": torch.zeros(1, 4, 2, 4, 6)},
            r"latents have the shape \(1, 4, 2, 4, 6\); for these videos it is \(1, 4, 3, 4, 6\)",
        ),
    ],
)
def test_wrong_arguments_are_named_before_any_step(pipe, monkeypatch, settings, message):
    monkeypatch.setattr(pipe, "_denoise", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a", **SMALL, **settings})


def test_embeddings_of_a_wrong_shape_are_named_where_they_are_repeated(pipe):
    with pytest.raises(ValueError, match=r"^prompt_embeds have the shape \(24, 64\)"):
        pipe.encode_prompt(None, prompt_embeds=torch.zeros(24, 64))


def test_numbers_may_be_of_numpy_or_whole(pipe):
    pipe.check_inputs("a", guidance_scale=np.float32(3), guidance_rescale=1, eta=np.float64(0.5))


def test_sizes_may_be_integers_of_numpy(pipe):
    pipe.check_inputs("a", np.int64(3), np.int32(32), np.int64(48), num_inference_steps=np.int64(2))


def test_components_that_do_not_fit_are_named(pipe):
    parts = dict(pipe.components)
    with pytest.raises(ValueError, match=r"of 32 channels \(cross_attention_dim\), the text encoder makes 64 \(hidden_size\)"):
        TextToVideoSwapPipeline(**{**parts, "unet": miniature.unet(**TINY_UNET, cross_attention_dim=32)})
    with pytest.raises(ValueError, match=r"of 9 channels \(in_channels\), the VAE makes 4 \(latent_channels\)"):
        TextToVideoSwapPipeline(**{**parts, "unet": miniature.unet(**TINY_UNET, in_channels=9)})


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            FlowMatchEulerDiscreteScheduler(),
            "FlowMatchEulerDiscreteScheduler does not suit .* it has no scale_model_input, init_n",
        ),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "prediction_type is 'flow_prediction', not one of epsilon, v_prediction, sample; DDIMScheduler, DPMSolver",
        ),
        (CogVideoXDPMScheduler(), "its step needs model_output, old_pred_original_sample, timestep, timestep_back, sample"),
    ],
)
def test_schedulers_of_another_kind_are_refused(pipe, scheduler, message):
    with pytest.raises(ValueError, match=message):
        TextToVideoSwapPipeline(**{**pipe.components, "scheduler": scheduler})
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        make_video(pipe)


def test_steps_that_a_scheduler_cannot_take_are_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_: pytest.fail("the text was embedded"))
    with pytest.raises(ValueError, match=r"num_inference_steps is 1001, which DDIMScheduler cannot take: it takes at most 1000"):
        make_video(pipe, num_inference_steps=1001)
    with pytest.raises(ValueError, match=r"timesteps is \[900, 20\], which DDIMScheduler cannot take: .*custom"):
        make_video(pipe, timesteps=[900, 20])
    with pytest.raises(ValueError, match="num_inference_steps is None"):
        make_video(pipe, num_inference_steps=None)


def test_checking_leaves_the_scheduler_as_it_is(pipe):
    pipe.scheduler.set_timesteps(7)
    pipe.check_inputs("a red circle", num_inference_steps=3)
    assert len(pipe.scheduler.timesteps) == 7
