"""The diffusion loss against its formulas, and draws that depend on nothing but a sample's number."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from videofactory.model import miniature
from videofactory.model.training.objective import (
    Draws,
    denoising_losses,
    draw,
    drop_captions,
    generators,
    loss_weights,
    min_snr_weights,
    offset_noise,
    seed_layers,
    signal_to_noise,
    sum_by_timestep,
    training_scheduler,
    training_target,
)
from videofactory.model.training.settings import NoiseSettings

from .tiny_unets import tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 4, 3, 6, 7)
PLAIN = NoiseSettings()
VELOCITY = NoiseSettings(prediction="v_prediction")
ZERO = NoiseSettings(prediction="v_prediction", zero_terminal_snr=True, min_snr_gamma=5.0)
T = 1000


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestScheduler:
    @pytest.mark.parametrize("start", [DDPMScheduler, DDIMScheduler])
    def test_keeps_the_starts_betas(self, start: type) -> None:
        given = start(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        made = training_scheduler(given, VELOCITY)
        assert torch.equal(made.alphas_cumprod, given.alphas_cumprod)
        assert made.config.prediction_type == "v_prediction"
        assert made.config.timestep_spacing == given.config.timestep_spacing

    def test_ends_in_pure_noise_where_it_should(self) -> None:
        made = training_scheduler(miniature.scheduler(), ZERO)
        assert made.alphas_cumprod[-1] == 0
        assert made.alphas_cumprod[0] == pytest.approx(miniature.scheduler().alphas_cumprod[0].item(), rel=1e-5)
        assert (made.alphas_cumprod.diff() < 0).all()
        made.set_timesteps(10)
        assert made.timesteps[0] == T - 1

    def test_refuses_flow_matching(self) -> None:
        with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no betas"):
            training_scheduler(FlowMatchEulerDiscreteScheduler(), PLAIN)


class TestTarget:
    def test_of_epsilon_is_the_noise(self) -> None:
        noise = randn(*SHAPE)
        assert training_target(miniature.scheduler(), "epsilon", randn(*SHAPE, seed=1), noise, torch.arange(4)) is noise

    @pytest.mark.parametrize("settings", [VELOCITY, ZERO], ids=["usual", "zero terminal"])
    def test_of_velocity_gives_latents_and_noise_back(self, settings: NoiseSettings) -> None:
        scheduler = training_scheduler(miniature.scheduler(), settings)
        latents, noise, timesteps = randn(*SHAPE, seed=1), randn(*SHAPE), torch.tensor([0, 333, 777, 999])
        velocity = training_target(scheduler, "v_prediction", latents, noise, timesteps)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        a = scheduler.alphas_cumprod[timesteps].double()[:, None, None, None, None]
        signal, deviation = a.sqrt(), (1 - a).sqrt()
        torch.testing.assert_close(signal * noisy - deviation * velocity, latents.double(), atol=2e-6, rtol=0)
        torch.testing.assert_close(deviation * noisy + signal * velocity, noise.double(), atol=2e-6, rtol=0)
        if settings is ZERO:
            torch.testing.assert_close(velocity[-1], -latents[-1])
            torch.testing.assert_close(noisy[-1], noise[-1])

    def test_of_anything_else_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="'sample'; epsilon or v_prediction"):
            training_target(miniature.scheduler(), "sample", randn(*SHAPE), randn(*SHAPE), torch.arange(4))


class TestWeights:
    def test_ratio_is_that_of_the_variances(self) -> None:
        scheduler, timesteps = miniature.scheduler(), torch.tensor([0, 500, 999])
        a = scheduler.alphas_cumprod[timesteps].double()
        torch.testing.assert_close(signal_to_noise(scheduler, timesteps).double(), a / (1 - a), rtol=1e-4, atol=0)
        assert signal_to_noise(training_scheduler(scheduler, ZERO), torch.tensor([999])) == 0

    def test_are_those_of_the_paper(self) -> None:
        snr = torch.tensor([0.01, 1.0, 5.0, 10.0, 1000.0])
        torch.testing.assert_close(min_snr_weights(snr, 5, "epsilon"), torch.tensor([1, 1, 1, 0.5, 0.005]))
        expected = torch.tensor([0.01 / 1.01, 1 / 2, 5 / 6, 5 / 11, 5 / 1001])
        torch.testing.assert_close(min_snr_weights(snr, 5, "v_prediction"), expected)

    def test_are_numbers_at_pure_noise_and_at_none(self) -> None:
        snr = torch.tensor([0.0, 1e-38, 3e38])
        for prediction in ("epsilon", "v_prediction"):
            weights = min_snr_weights(snr, 5, prediction)
            assert weights.isfinite().all()
            assert weights[-1] == pytest.approx(0, abs=1e-6)
        assert min_snr_weights(snr, 5, "epsilon")[0] == 1
        assert min_snr_weights(snr, 5, "v_prediction")[0] == 0
        assert min_snr_weights(snr, 5, "v_prediction", floor=1.0)[0] == 1

    def test_floor_changes_what_lies_below_it_alone(self) -> None:
        snr = torch.tensor([0.0, 0.5, 1.0, 3.0, 100.0])
        plain, floored = (min_snr_weights(snr, 5, "v_prediction", floor) for floor in (0.0, 1.0))
        torch.testing.assert_close(floored[:2], torch.tensor([1.0, 1 / 1.5]))
        torch.testing.assert_close(floored[2:], plain[2:])
        with pytest.raises(ValueError, match=r"floor 1.0 is above gamma 0.5"):
            min_snr_weights(snr, 0.5, "v_prediction", 1.0)

    def test_every_step_is_trained_with_zero_terminal_ratio(self) -> None:
        scheduler = training_scheduler(miniature.scheduler(), ZERO)
        weights = loss_weights(scheduler, torch.arange(T), ZERO)
        assert weights[-1] == 1
        assert weights.min() > 0
        assert loss_weights(scheduler, torch.arange(T), ZERO.model_copy(update={"min_snr_gamma": 0.3}))[-1] == pytest.approx(0.3)

    def test_are_one_unless_asked_for(self) -> None:
        assert torch.equal(loss_weights(miniature.scheduler(), torch.arange(9), PLAIN), torch.ones(9))


class TestDraws:
    def test_depend_on_the_sample_alone(self) -> None:
        whole = draw(3, 17, range(4), SHAPE, T, PLAIN, 0.5)
        parts = [draw(3, 17, numbers, (2, *SHAPE[1:]), T, PLAIN, 0.5) for numbers in ([0, 2], [1, 3])]
        for name in ("timesteps", "noise", "dropped"):
            there = [getattr(part, name) for part in parts]
            assert torch.equal(getattr(whole, name)[[0, 2, 1, 3]], torch.cat(there)), name

    @pytest.mark.parametrize("other", [(4, 17, 0), (3, 18, 0), (3, 17, 1)])
    def test_differ_by_seed_step_and_sample(self, other: tuple[int, int, int]) -> None:
        first, second = (draw(seed, step, [sample], (1, *SHAPE[1:]), T, PLAIN) for seed, step, sample in ((3, 17, 0), other))
        assert first.timesteps != second.timesteps
        assert not torch.equal(first.noise, second.noise)

    def test_leave_the_global_generator_alone(self) -> None:
        state = torch.get_rng_state()
        draw(0, 0, range(4), SHAPE, T, NoiseSettings(offset_noise=0.1), 0.5)
        assert torch.equal(torch.get_rng_state(), state)

    def test_are_spread_evenly(self) -> None:
        draws = draw(0, 0, range(4000), (4000, 1, 1, 1, 1), T, PLAIN, 0.25)
        assert (draws.timesteps.min(), draws.timesteps.max()) >= (0, 990)
        assert draws.timesteps.max() < T
        assert draws.timesteps.float().mean() == pytest.approx(499.5, abs=4 * T / math.sqrt(12 * 4000))
        assert draws.noise.mean().abs() < 4 / math.sqrt(4000)
        assert draws.noise.std() == pytest.approx(1, abs=0.05)
        assert draws.dropped.float().mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
        assert abs(torch.corrcoef(torch.stack([draws.timesteps.float(), draws.noise.flatten()]))[0, 1]) < 4 / math.sqrt(4000)

    def test_of_one_thing_do_not_move_another(self) -> None:
        plain = draw(0, 5, range(4), SHAPE, T, PLAIN, 0.5)
        offset = draw(0, 5, range(4), SHAPE, T, NoiseSettings(offset_noise=0.1), 0.5)
        fixed = draw(0, 5, range(4), SHAPE, T, PLAIN, 0.5, timestep=7)
        assert torch.equal(plain.timesteps, offset.timesteps)
        assert torch.equal(plain.dropped, offset.dropped)
        assert torch.equal(plain.noise, fixed.noise)
        assert torch.equal(fixed.timesteps, torch.full((4,), 7))

    def test_need_a_number_for_every_sample_and_a_step_that_exists(self) -> None:
        with pytest.raises(ValueError, match="3 samples and latents of the shape"):
            draw(0, 0, range(3), SHAPE, T, PLAIN)
        with pytest.raises(ValueError, match="time step 1000; the scheduler has the steps 0 to 999"):
            draw(0, 0, range(4), SHAPE, T, PLAIN, timestep=T)

    def test_no_caption_is_dropped_unless_asked_for(self) -> None:
        assert not draw(0, 0, range(4), SHAPE, T, PLAIN).dropped.any()
        assert draw(0, 0, range(4), SHAPE, T, PLAIN, 1.0).dropped.all()

    def test_layers_are_seeded_by_step_and_process(self) -> None:
        drawn = []
        for arguments in ((1, 2, 0), (1, 2, 0), (1, 3, 0), (1, 2, 1)):
            seed_layers(*arguments)
            drawn.append(torch.rand(3))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], drawn[3])


class TestOffsetNoise:
    @pytest.mark.parametrize(("per", "constants"), [("clip", 1), ("frame", 3)])
    def test_adds_one_constant_per_channel(self, per: str, constants: int) -> None:
        noise = randn(*SHAPE)
        added = offset_noise(noise, 0.5, per, generators(0, 0, range(4), "offset noise")) - noise
        torch.testing.assert_close(added, added.mean(dim=(3, 4), keepdim=True).expand(SHAPE), atol=1e-6, rtol=0)
        rounded = (added.mean(dim=(3, 4)) * 1e4).round()
        assert {len(set(frames.tolist())) for clip in rounded for frames in clip} == {constants}

    def test_widens_the_mean_of_a_picture_by_its_strength(self) -> None:
        settings = NoiseSettings(offset_noise=0.5)
        means = draw(0, 0, range(600), (600, 4, 1, 8, 8), T, settings).noise.mean(dim=(2, 3, 4)).flatten()
        assert means.mean().abs() < 4 * 0.52 / math.sqrt(len(means))
        # The mean of 64 numbers has the variance 1/64, and the constant 0.25.
        assert means.var() == pytest.approx(0.25 + 1 / 64, rel=0.12)


class TestLosses:
    @pytest.mark.parametrize("settings", [PLAIN, VELOCITY, ZERO], ids=["epsilon", "velocity", "zero terminal"])
    def test_is_nothing_for_a_model_that_knows_the_answer(self, settings: NoiseSettings) -> None:
        scheduler = training_scheduler(miniature.scheduler(), settings)
        latents, text = randn(*SHAPE, seed=1), randn(4, 5, 16)
        draws = draw(0, 0, range(4), SHAPE, T, settings)
        truth = training_target(scheduler, settings.prediction, latents, draws.noise, draws.timesteps)
        losses = denoising_losses(lambda *_, **__: (truth,), scheduler, latents, text, draws, settings)
        assert losses.weighted.shape == (4,)
        assert torch.equal(losses.weighted, torch.zeros(4))
        off = denoising_losses(lambda *_, **__: (truth + 2,), scheduler, latents, text, draws, settings)
        torch.testing.assert_close(off.plain, torch.full((4,), 4.0))
        torch.testing.assert_close(off.weighted, 4 * loss_weights(scheduler, draws.timesteps, settings))

    def test_teaches_the_terminal_step_without_a_nan(self) -> None:
        unet, scheduler = tiny_unet().train(), training_scheduler(miniature.scheduler(), ZERO)
        draws = draw(0, 0, range(2), (2, *SHAPE[1:]), T, ZERO, timestep=T - 1)
        losses = denoising_losses(unet, scheduler, randn(2, *SHAPE[1:]), randn(2, 5, 16), draws, ZERO)
        losses.weighted.mean().backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in unet.parameters())
        assert unet.conv_out.weight.grad.abs().max() > 1e-4
        assert not losses.plain.requires_grad

    def test_is_float32_under_half_precision(self) -> None:
        unet, scheduler = tiny_unet(), training_scheduler(miniature.scheduler(), PLAIN)
        draws = draw(0, 0, range(4), SHAPE, T, PLAIN)
        latents, text = randn(*SHAPE), randn(4, 5, 16)
        expected = denoising_losses(unet, scheduler, latents, text, draws, PLAIN)
        with torch.autocast("cpu", torch.bfloat16):
            found = denoising_losses(unet, scheduler, latents, text.bfloat16(), draws, PLAIN)
        assert found.weighted.dtype == torch.float32
        torch.testing.assert_close(found.weighted, expected.weighted, rtol=0.05, atol=0)

    def test_captions_are_replaced_where_dropped(self) -> None:
        text, empty = randn(3, 5, 16), randn(1, 5, 16, seed=1)
        mixed = drop_captions(text, empty, torch.tensor([False, True, False]))
        assert torch.equal(mixed[[0, 2]], text[[0, 2]])
        assert torch.equal(mixed[1], empty[0])

    def test_are_summed_by_time_step(self) -> None:
        settings = PLAIN
        draws = Draws(torch.tensor([0, 99, 100, 999]), torch.zeros(4, 1, 1, 1, 1), torch.zeros(4, dtype=torch.bool))
        errors = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None, None]
        losses = denoising_losses(
            lambda *_, **__: (errors,), miniature.scheduler(), torch.zeros(4, 1, 1, 1, 1), randn(4, 5, 16), draws, settings
        )
        sums = sum_by_timestep(losses, T)
        assert sums[0].tolist() == [1 + 4, 9, 0, 0, 0, 0, 0, 0, 0, 16]
        assert sums[1].tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
