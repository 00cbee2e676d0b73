"""The pipeline over the miniature: seeds, batches, callbacks, schedulers, sizes."""

import logging

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from videofactory.model import miniature, pipeline_texts
from videofactory.model.pipeline import TextToVideoSwapPipeline

from .model_pipelines import SMALL, TINY_UNET, make_video, seeded, small_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_seed_decides_the_video(pipe):
    first = make_video(pipe, seed=1)
    np.testing.assert_array_equal(first, make_video(pipe, seed=1))
    assert np.abs(first - make_video(pipe, seed=2)).mean() > 0.02
    assert first.shape == (1, 3, 32, 48, 3)


def test_a_video_in_a_batch_is_the_video_made_alone(pipe):
    prompts = ["a red circle", "a blue star", "a green ring in front of a dotted background"]
    batch = make_video(pipe, prompts, generator=[seeded(seed) for seed in (3, 4, 5)])
    for place, prompt in enumerate(prompts):
        np.testing.assert_allclose(batch[place], make_video(pipe, prompt, generator=[seeded(3 + place)])[0], atol=2e-5)


def test_videos_of_one_prompt_differ_and_stand_by_their_prompt(pipe):
    videos = make_video(
        pipe, ["a red circle", "a blue star"], num_videos_per_prompt=2, generator=[seeded(seed) for seed in range(4)]
    )
    assert len(videos) == 4
    assert np.abs(videos[0] - videos[1]).mean() > 0.02
    np.testing.assert_allclose(videos[1], make_video(pipe, "a red circle", seed=1)[0], atol=2e-5)
    np.testing.assert_allclose(videos[2], make_video(pipe, "a blue star", seed=2)[0], atol=2e-5)


def test_a_tuple_holds_what_the_object_holds(pipe):
    found = pipe("a red circle", generator=seeded(0), output_type="np", return_dict=False, **SMALL)
    assert isinstance(found, tuple)
    np.testing.assert_array_equal(found[0], make_video(pipe))


def test_defaults_are_those_of_the_saved_pipeline(pipe):
    latents = pipe("a red circle", num_inference_steps=1, output_type="latent").frames
    assert latents.shape == (1, 4, miniature.FRAMES, miniature.HEIGHT // 8, miniature.WIDTH // 8)


def test_output_types_show_the_same_video(pipe):
    video = make_video(pipe)
    tensor = make_video(pipe, output_type="pt")
    assert tensor.shape == (1, 3, 3, 32, 48)
    np.testing.assert_allclose(tensor.permute(0, 1, 3, 4, 2).numpy(), video, atol=1e-6)
    images = make_video(pipe, output_type="pil")
    assert isinstance(images[0][0], PIL.Image.Image)
    assert images[0][0].size == (48, 32)
    np.testing.assert_allclose(np.asarray(images[0][1]) / 255, video[0, 1], atol=0.003)
    latents = make_video(pipe, output_type="latent")
    torch.testing.assert_close(pipe.decode_latents(latents, decode_chunk_size=None), pipe.decode_latents(latents))
    decoded = pipe.decode_latents(latents, decode_chunk_size=2)
    np.testing.assert_allclose((decoded / 2 + 0.5).clamp(0, 1).detach().permute(0, 2, 3, 4, 1).numpy(), video, atol=1e-5)


@pytest.mark.parametrize(("chunk", "sizes"), [(2, [2, 1]), (3, [3]), (None, [3])])
def test_the_vae_decodes_that_many_frames_at_once(pipe, monkeypatch, chunk, sizes):
    """`None` is all of them, as for other video pipelines of diffusers."""
    decode, seen = pipe.vae.decode, []

    def decode_and_count(latents, **settings):
        seen.append(len(latents))
        return decode(latents, **settings)

    monkeypatch.setattr(pipe.vae, "decode", decode_and_count)
    assert make_video(pipe, decode_chunk_size=chunk, num_inference_steps=1).shape == (1, 3, 32, 48, 3)
    assert seen == sizes


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 48), (2, 16, 16), (5, 40, 24), (2, 192, 344)])
def test_sizes(pipe, frames, height, width):
    video = make_video(pipe, num_frames=frames, height=height, width=width, num_inference_steps=1)
    assert video.shape == (1, frames, height, width, 3)
    assert np.isfinite(video).all()


def test_a_picture_needs_no_layer_over_time(pipe):
    """One frame passes through the spatial layers alone, whatever the others hold."""
    picture = make_video(pipe, num_frames=1)
    plain = miniature.pipeline(unet=miniature.unet(seed=1, **TINY_UNET, interaction="none"))
    plain.set_progress_bar_config(disable=True)
    plain.unet.load_state_dict({name: pipe.unet.state_dict()[name] for name in plain.unet.state_dict()})
    np.testing.assert_allclose(picture, make_video(plain, num_frames=1), atol=1e-5)


# Text


def test_embedding_apart_gives_the_same_video(pipe):
    prompt, negative = pipe.encode_prompt(["a red circle", "a blue star"], negative_prompt="a cross")
    assert prompt.shape == negative.shape == (2, 24, 64)
    inside = make_video(pipe, ["a red circle", "a blue star"], negative_prompt="a cross")
    np.testing.assert_array_equal(inside, make_video(pipe, None, prompt_embeds=prompt, negative_prompt_embeds=negative))


def test_embeddings_are_repeated_in_the_order_of_the_prompts(pipe):
    once, _ = pipe.encode_prompt(["a red circle", "a blue star"], do_classifier_free_guidance=False)
    twice, nothing = pipe.encode_prompt(["a red circle", "a blue star"], None, 2, False)
    assert nothing is None
    torch.testing.assert_close(twice, once[[0, 0, 1, 1]])


def test_prompts_and_negative_prompts_count(pipe):
    video = make_video(pipe)
    assert np.abs(video - make_video(pipe, "a blue star")).mean() > 1e-3
    negative = make_video(pipe, negative_prompt="a blue star")
    assert np.abs(video - negative).mean() > 1e-3
    np.testing.assert_array_equal(negative, make_video(pipe, negative_prompt=["a blue star"]))
    np.testing.assert_array_equal(video, make_video(pipe, negative_prompt=""))


def test_what_a_long_prompt_loses_is_said_once(caplog):
    pipe = small_pipeline()
    prompt = " ".join(["a red circle"] * 7 + ["a purple star"] + ["on a ring"] * 2)
    with caplog.at_level(logging.WARNING, logger="videofactory.model.pipeline"):
        for _ in range(2):
            make_video(pipe, prompt, num_inference_steps=1)
        make_video(pipe, "a red circle " * 7, num_inference_steps=1)
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt 'a red circle a red circle a red circle a red circle a red circle a red circle a…' has 32 tokens, "
        "of which 24 are read; the last 8 are left out: 'purple star on a ring on a ring'"
    ]


def test_of_few_long_prompts_it_is_known_that_they_were_told(caplog):
    """A service has ever new ones; the first comes back here when it is forgotten."""
    pipe = small_pipeline()
    prompts = [f"{number} " + "a red circle " * 9 for number in range(pipeline_texts.MOST_REMEMBERED + 1)]
    warnings = pipe._loss_warnings
    for _ in range(2):
        warnings.tell([*prompts, prompts[-1]], pipe.tokenizer)
        assert len(warnings) == pipeline_texts.MOST_REMEMBERED
    assert len(caplog.records) == 2 * len(prompts)


def test_a_very_long_prompt_is_told_in_few_words(caplog):
    pipe = small_pipeline()
    with caplog.at_level(logging.WARNING, logger="videofactory.model.pipeline"):
        pipe.encode_prompt("a red circle\non a ring " * 180)
    assert "has 1082 tokens, of which 24 are read; the last 1058 are left out" in caplog.text
    assert len(caplog.records[0].getMessage()) < 320
    assert "\n" not in caplog.records[0].getMessage()


# Guidance


def _batches(pipe: TextToVideoSwapPipeline, **settings) -> list[int]:
    seen: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    try:
        make_video(pipe, **settings)
    finally:
        hook.remove()
    return seen


def test_without_guidance_the_unet_runs_half(pipe):
    assert _batches(pipe, guidance_scale=7.5) == [2, 2, 2]
    assert _batches(pipe, guidance_scale=1.0) == [1, 1, 1]
    np.testing.assert_array_equal(
        make_video(pipe, guidance_scale=1.0), make_video(pipe, guidance_scale=0.0, negative_prompt="a blue star")
    )


def test_guidance_is_the_text_against_the_negative_prompt(pipe):
    """At a step without noise of its own, the guided latents are the straight line through both unguided ones."""
    options = {"num_inference_steps": 1, "output_type": "latent"}
    with_text = make_video(pipe, "a red circle", guidance_scale=1.0, **options)
    without = make_video(pipe, "a star", guidance_scale=1.0, **options)
    guided = make_video(pipe, "a red circle", negative_prompt="a star", guidance_scale=4.0, **options)
    torch.testing.assert_close(guided, without + 4 * (with_text - without), rtol=1e-3, atol=1e-4)


def test_guidance_rescale_restores_the_deviation(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample", set_alpha_to_one=True)
    options = {"num_inference_steps": 1, "output_type": "latent"}
    with_text = make_video(pipe, guidance_scale=1.0, **options)
    guided = make_video(pipe, guidance_scale=60.0, **options)
    rescaled = make_video(pipe, guidance_scale=60.0, guidance_rescale=1.0, **options)
    assert abs(guided.std() / with_text.std() - 1) > 0.02
    torch.testing.assert_close(rescaled.std(), with_text.std(), rtol=1e-3, atol=0)
    half = make_video(pipe, guidance_scale=60.0, guidance_rescale=0.5, **options)
    torch.testing.assert_close(half, (guided + rescaled) / 2, rtol=1e-3, atol=1e-4)


# Schedulers


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (DPMSolverMultistepScheduler, {}),
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
        (EulerAncestralDiscreteScheduler, {}),
        (HeunDiscreteScheduler, {}),
        (DDIMScheduler, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ],
)
def test_schedulers_are_exchanged(pipe, scheduler, settings):
    before = make_video(pipe)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    video = make_video(pipe, generator=[seeded(0)])
    assert np.isfinite(video).all()
    assert np.abs(video - before).max() > 1e-3
    np.testing.assert_array_equal(video, make_video(pipe, generator=[seeded(0)]))


def test_eta_adds_noise_of_the_generator(pipe):
    still, moved = make_video(pipe, eta=0.0), make_video(pipe, eta=1.0)
    assert np.abs(still - moved).max() > 1e-3
    np.testing.assert_array_equal(moved, make_video(pipe, eta=1.0))


def test_steps_can_be_named(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = []
    make_video(pipe, timesteps=[900, 500, 20], callback_on_step_end=lambda _p, _n, step, _t: seen.append(int(step)))
    assert seen == [900, 500, 20]


def test_noise_can_be_given(pipe):
    noise = torch.randn((1, 4, 3, 4, 6), generator=seeded(0))
    np.testing.assert_array_equal(make_video(pipe, latents=noise, generator=None), make_video(pipe))


# Callbacks


def test_a_callback_sees_every_step(pipe):
    calls = []

    def callback(pipeline, number, step, tensors):
        calls.append((number, int(step), sorted(tensors), pipeline.guidance_scale, pipeline.num_timesteps))
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    video = make_video(pipe, guidance_scale=5.0, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [call[0] for call in calls] == [0, 1, 2]
    assert [call[1] for call in calls] == pipe.scheduler.timesteps.tolist()
    assert all(call[2:] == (sorted(names), 5.0, 3) for call in calls)
    np.testing.assert_array_equal(video, make_video(pipe, guidance_scale=5.0))


def test_a_callback_is_given_what_it_asks_for(pipe):
    seen = []
    make_video(pipe, callback_on_step_end=lambda _p, _n, _s, tensors: seen.append(set(tensors)))
    make_video(
        pipe,
        callback_on_step_end=lambda _p, _n, _s, tensors: seen.append(set(tensors)),
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert seen == [{"latents"}] * 3 + [{"prompt_embeds"}] * 3


def test_a_callback_may_exchange_tensors(pipe):
    def empty_at_the_end(_pipeline, number, _step, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if number == 2 else None

    assert not make_video(pipe, output_type="latent", callback_on_step_end=empty_at_the_end).any()

    other, _ = pipe.encode_prompt("a blue star")

    def another_prompt(_pipeline, _number, _step, _tensors):
        return {"prompt_embeds": other}

    mixed = make_video(pipe, output_type="latent", callback_on_step_end=another_prompt)
    assert not torch.equal(mixed, make_video(pipe, output_type="latent"))
    assert not torch.equal(mixed, make_video(pipe, "a blue star", output_type="latent"))


def test_a_callback_may_interrupt(pipe):
    steps = []

    def callback(pipeline, number, _step, tensors):
        steps.append(number)
        pipeline._interrupt = number == 1
        return tensors

    make_video(pipe, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert len(_batches(pipe)) == 3


# Memory


def test_decoding_in_chunks_slices_or_tiles_shows_the_same(pipe):
    latents = make_video(pipe, num_frames=4, output_type="latent")
    whole = pipe.decode_latents(latents)
    for size in (1, 3):
        torch.testing.assert_close(pipe.decode_latents(latents, size), whole, atol=1e-5, rtol=0)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(pipe.decode_latents(latents), whole, atol=1e-5, rtol=0)
    pipe.vae.disable_slicing()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32
    pipe.vae.enable_tiling()
    tiled = pipe.decode_latents(latents)
    pipe.vae.disable_tiling()
    assert tiled.shape == whole.shape
    # Every tile is normed by itself, so tiles cannot be equal to the whole.
    assert (tiled - whole).abs().mean() < 0.3


def test_the_vae_may_be_in_half_precision(pipe):
    latents = make_video(pipe, output_type="latent")
    expected = pipe.decode_latents(latents)
    half = miniature.pipeline(unet=pipe.unet)
    half.vae.to(torch.bfloat16)
    decoded = half.decode_latents(latents)
    assert decoded.dtype == torch.float32
    assert (decoded - expected).abs().mean() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph is recorded on a GPU")
def test_a_cuda_graph_changes_nothing():
    plain, replayed = (small_pipeline().to("cuda") for _ in range(2))
    replayed.enable_cuda_graph()
    for settings in ({}, {"num_frames": 3}, {"guidance_scale": 1.0}, {}):
        for seed in (0, 1):  # the second is a replay, with other noise
            expected, found = (make_video(pipe, seed=seed, **settings) for pipe in (plain, replayed))
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_cuda_graph_needs_a_gpu(pipe):
    with pytest.raises(ValueError, match="it is on cpu"):
        pipe.enable_cuda_graph()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="models are offloaded from an accelerator")
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_changes_nothing(way):
    plain = small_pipeline().to("cuda")
    expected = make_video(plain)
    offloaded = small_pipeline()
    getattr(offloaded, way)()
    for _ in range(2):
        np.testing.assert_allclose(make_video(offloaded), expected, atol=1e-4)
    assert offloaded.unet.device.type in ("cpu", "meta")
