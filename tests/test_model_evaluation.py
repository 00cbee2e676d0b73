"""Distances against closed forms and other people's functions, and what they show of drawn clips with the built-in extractors."""

import math

import numpy as np
import pytest
import torch

from videofactory.model.evaluation import distances, measures
from videofactory.model.evaluation.extractors import RandomImageExtractor, RandomVideoExtractor
from videofactory.model.evaluation.metrics import Features, check_names, extract, score

from .evaluation_clips import blurred, clip, clips, shuffled, tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def random_features(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return scale * torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + shift


class TestFrechet:
    def test_of_two_known_gaussians(self):
        # Covariances with the same axes: |m1 - m2|² plus the squared difference of deviations along each.
        mean, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])
        found = distances.frechet_of_gaussians(
            mean, torch.diag(torch.tensor([4.0, 1.0, 9.0])), other, torch.diag(torch.tensor([1.0, 1.0, 0.0]))
        )
        assert found == pytest.approx(4 + 1 + 0 + 9, abs=1e-9)

    def test_of_two_gaussians_whose_axes_differ(self):
        # tr (AB)^½ of 2 x 2 matrices is (tr AB + 2 (det AB)^½)^½.
        first = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
        second = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
        product = first @ second
        root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
        found = distances.frechet_of_gaussians(torch.zeros(2), first, torch.zeros(2), second)
        assert found == pytest.approx(float(first.trace() + second.trace()) - 2 * root, abs=1e-9)

    @pytest.mark.parametrize("count", [8, 40, 300], ids=["fewer-rows", "about-as-many", "more-rows"])
    def test_of_a_set_with_itself_is_zero(self, count):
        features = random_features(count, 32, 0, scale=10)
        assert distances.frechet(features, features.flip(0)) == pytest.approx(0, abs=1e-8)

    @pytest.mark.parametrize(("count", "others", "width"), [(300, 200, 24), (1000, 1000, 64), (90, 700, 64)])
    def test_is_what_torchmetrics_gives(self, count, others, width):
        fid = pytest.importorskip("torchmetrics.image.fid")
        first, second = random_features(count, width, 1), random_features(others, width, 2, scale=1.4, shift=0.2)
        wanted = float(fid._compute_fid(first.mean(0), first.T.cov(), second.mean(0), second.T.cov()))
        assert distances.frechet(first, second) == pytest.approx(wanted, rel=1e-6)
        means = (*distances.gaussian(first), *distances.gaussian(second))
        assert distances.frechet_of_gaussians(*means) == pytest.approx(wanted, rel=1e-6)

    def test_both_ways_to_the_trace_agree_where_covariances_are_singular(self):
        first, second = random_features(12, 48, 3), random_features(20, 48, 4, scale=2)
        by_eigenvalues = distances.frechet_of_gaussians(*distances.gaussian(first), *distances.gaussian(second))
        assert distances.frechet(first, second) == pytest.approx(by_eigenvalues, rel=1e-5)

    def test_does_not_depend_on_order_or_side(self):
        first, second = random_features(80, 16, 5), random_features(60, 16, 6, shift=1)
        wanted = distances.frechet(first, second)
        assert distances.frechet(first[torch.randperm(80)], second.flip(0)) == pytest.approx(wanted, rel=1e-9)
        assert distances.frechet(second, first) == pytest.approx(wanted, rel=1e-9)

    def test_large_features_in_half_precision_do_not_lose_it(self):
        """float32 sums would: the mean is 10,000 times the deviation."""
        first, second = random_features(200, 8, 7).float() + 1e4, random_features(200, 8, 8).float() + 1e4
        wanted = distances.frechet(first.double() - 1e4, second.double() - 1e4)
        assert distances.frechet(first, second) == pytest.approx(wanted, rel=1e-6)

    @pytest.mark.parametrize(
        ("features", "words"),
        [
            (torch.zeros(1, 4), "at least 2 rows"),
            (torch.full((5, 4), math.nan), "no number"),
            (torch.zeros(5, 3), "3 features in one set and 4"),
        ],
    )
    def test_what_it_cannot_take_is_said(self, features, words):
        with pytest.raises(ValueError, match=words):
            distances.frechet(features, torch.ones(5, 4))


class TestKernelDistance:
    def test_is_what_torchmetrics_gives(self):
        kid = pytest.importorskip("torchmetrics.image.kid")
        first, second = random_features(50, 16, 1), random_features(50, 16, 2, shift=0.3)
        wanted = float(kid.poly_mmd(first, second))
        assert distances.kernel_distance(first[:, None], second[:, None]) == pytest.approx(wanted, rel=1e-6)

    def test_rows_of_videos_are_rows(self, monkeypatch):
        first, second = random_features(24, 8, 3).view(6, 4, 8), random_features(30, 8, 4).view(10, 3, 8)
        wanted = distances.kernel_distance(first.view(24, 1, 8), second.view(30, 1, 8))
        monkeypatch.setattr(distances, "_ROWS", 8)  # several blocks, the last one not full
        assert distances.kernel_distance(first, second) == pytest.approx(wanted, rel=1e-9)

    def test_is_unbiased(self):
        """Sets of one distribution are at 0 on average, however small they are; the biased estimator is at 0.3 here."""
        values = [
            distances.kernel_distance(
                *(torch.randn(8, 1, 4, generator=torch.Generator().manual_seed(2 * n + side)) for side in (0, 1))
            )
            for n in range(400)
        ]
        assert abs(np.mean(values)) < 4 * np.std(values) / 400**0.5

    def test_a_resample_is_the_distance_of_the_drawn(self):
        """Checked where no video is drawn twice: a resample without repetition is a smaller set."""
        first, second = random_features(20, 8, 5).view(10, 2, 8), random_features(12, 8, 6).view(12, 1, 8)
        weights = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 0, 1, 0])
        found = distances.kernel_sums(first, second).mmd(weights, torch.ones(12))
        assert found == pytest.approx(distances.kernel_distance(first[weights.bool()], second), rel=1e-9)

    def test_one_video_is_too_few(self):
        with pytest.raises(ValueError, match="sets of 1 and 3 videos"):
            distances.kernel_distance(torch.zeros(1, 4, 2), torch.zeros(3, 4, 2))


class TestBootstrap:
    def test_of_a_mean_is_the_textbook_interval(self):
        values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = distances.bootstrap(lambda drawn: float(values[drawn].mean()), (400,), float(values.mean()), 1000, seed=3)
        error = 1.96 * float(values.std()) / 20
        assert found.low == pytest.approx(float(values.mean()) - error, abs=0.02)
        assert found.high == pytest.approx(float(values.mean()) + error, abs=0.02)

    def test_is_the_same_again_and_other_with_another_seed(self):
        values = torch.arange(30.0)
        one, again, other = (
            distances.bootstrap(lambda drawn: float(values[drawn].mean()), (30,), 14.5, 20, seed) for seed in (1, 1, 2)
        )
        assert one == again != other

    def test_too_few_resamples(self):
        with pytest.raises(ValueError, match="at least 5"):
            distances.bootstrap(lambda _: 0.0, (3,), 0.0, 4)

    def test_holds_the_distance_of_large_samples(self):
        """The interval of a Fréchet distance holds what the distance is with many more videos, its bias apart."""
        first, second = random_features(20_000, 4, 1), random_features(20_000, 4, 2, scale=1.5)
        truth = distances.frechet(first, second)
        inside = 0
        for trial in range(20):
            a, b = first[300 * trial : 300 * trial + 300, None], second[300 * trial : 300 * trial + 300, None]
            features, other = Features({"video": [a]}), Features({"video": [b]})
            interval = score("fvd", features, other, 60, seed=trial)[0].interval
            inside += interval["low"] <= truth <= interval["high"]
        assert inside >= 15


class TestWhatItShows:
    """With the built-in extractor, on drawn clips that are at hand nowhere else."""

    extractor = RandomVideoExtractor()
    real = clips(80)

    def features(self, videos: np.ndarray) -> torch.Tensor:
        return self.extractor(tensor(videos))

    def test_halves_of_a_set_are_at_the_floor(self):
        features = self.features(self.real)[:, None]
        floor = distances.floor(lambda a, b: distances.frechet_of_videos(features[a], features[b]), 80, seed=5)
        found = distances.frechet_of_videos(features[:40], features[40:])
        assert 0.5 * min(floor) <= found <= 1.5 * max(floor)

    def test_shuffled_frames_are_clearly_worse_than_the_floor(self):
        real, new = self.features(self.real[:40]), clips(40, begin=1000)
        floor, worse = distances.frechet(real, self.features(new)), distances.frechet(real, self.features(shuffled(new)))
        assert worse > 2 * floor

    def test_single_frames_do_not_see_the_shuffle(self):
        """What the distance of videos is for: of the same frames in another order that of pictures is zero."""
        frames = tensor(self.real[:20]).flatten(0, 1)
        mixed = tensor(shuffled(self.real[:20])).flatten(0, 1)
        extractor = RandomImageExtractor()
        assert distances.frechet(extractor(frames), extractor(mixed)) == pytest.approx(0, abs=1e-6)

    def test_more_blur_is_worse(self):
        real = self.features(self.real[:40])
        found = [distances.frechet(real, self.features(blurred(self.real[40:], sigma))) for sigma in (0.6, 1.5, 3, 6)]
        assert found == sorted(found) and found[-1] > 2 * found[0]

    def test_batches_and_their_order_do_not_count(self):
        whole = self.features(videos := self.real[:20])
        parts = torch.cat([self.features(videos[begin : begin + 3]) for begin in range(0, 20, 3)])
        other = self.features(self.real[20:60])
        assert distances.frechet(parts.flip(0), other) == pytest.approx(distances.frechet(whole, other), rel=1e-4)

    def test_the_weights_are_the_same_on_every_machine(self):
        assert RandomVideoExtractor().hash == self.extractor.hash
        assert self.extractor.hash.startswith("4412158821c6dc92")
        assert RandomImageExtractor().hash.startswith("b7b10125c6039ec4")


class TestMeasures:
    still = tensor(np.stack([clip(1)[:1].repeat(8, 0)]))
    moving = tensor(np.stack([clip(1, 8)]))

    def test_a_still_picture_does_not_move_and_is_consistent(self):
        assert measures.motion(self.still).item() == measures.displacement(self.still).item() == 0
        images = RandomImageExtractor()(self.still.flatten(0, 1))[None]
        assert measures.frame_consistency(images).item() == pytest.approx(1)

    def test_faster_is_more(self):
        videos = tensor(np.stack([clip(3, 8, speed) for speed in (0.5, 1, 2)]))
        for measure in (measures.motion, measures.displacement):
            found = measure(videos).tolist()
            assert found == sorted(found) and found[0] > 0

    def test_motion_of_black_and_white_in_turn_is_one(self):
        video = torch.zeros(1, 6, 3, 16, 16, dtype=torch.uint8)
        video[:, 1::2] = 255
        assert measures.motion(video).item() == pytest.approx(1)

    @pytest.mark.parametrize("contrast", [1.0, 0.4])
    def test_displacement_is_the_way_of_a_ramp_whatever_its_contrast(self, contrast):
        """A ramp that moves by 2 of 128 pixels a frame."""
        places = np.arange(128)[None, None, None, :, None] - 2 * np.arange(5)[None, :, None, None, None]
        frames = (127 + contrast * places).clip(0, 255).astype(np.uint8) * np.ones((1, 1, 128, 1, 3), np.uint8)
        assert measures.displacement(tensor(frames)).item() == pytest.approx(2 / 128, rel=0.1)

    def test_one_colour_that_flickers_by_rounding_hardly_moves(self):
        frames = np.full((1, 6, 32, 32, 3), 90, np.uint8)
        frames[0, 1::2, :4, :4] += 1
        assert measures.motion(tensor(frames)).item() < 1e-3

    def test_consistency_is_the_mean_cosine_of_neighbours(self):
        images = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
        assert measures.frame_consistency(images).item() == pytest.approx(0.5)
        assert measures.frame_consistency(images[:, :1]).item() == 1

    def test_agreement_is_the_mean_cosine_with_the_text_and_may_be_negative(self):
        images = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[-1.0, 0.0], [-2.0, 0.0]]])
        texts = torch.tensor([[5.0, 0.0], [1.0, 0.0]])
        assert measures.text_agreement(images, texts).tolist() == pytest.approx([0.5, -1])


class TestMetrics:
    def test_an_unknown_name_has_its_nearest(self):
        with pytest.raises(ValueError, match=r"--metric fdv is not known; is fvd meant\?"):
            check_names(["fdv"])
        assert check_names(["Motion", "fvd", "motion"]) == ["fvd", "motion"]

    def test_a_singular_covariance_is_said_with_its_rank(self):
        features = Features({"video": [random_features(10, 32, 1)[:, None]]})
        _, warnings = score("fvd", features, Features({"video": [random_features(40, 32, 2)[:, None]]}), 5, 0)
        assert len(warnings) == 1
        assert (
            "10 videos of the scored set for 32 features" in warnings[0] and "rank 9" in warnings[0] and "23 dir" in warnings[0]
        )

    @pytest.mark.parametrize(
        ("extractor", "words"),
        [
            (lambda pixels: pixels.float().flatten(1)[:1], "gave (1, 110592) for 2"),
            (lambda pixels: torch.full((len(pixels), 3), math.inf), "no numbers"),
            (lambda pixels: pixels.float() @ torch.zeros(7, 7), "cannot take 2x12x3x48x64"),
        ],
    )
    def test_what_an_extractor_does_wrong_is_said(self, extractor, words):
        frames = tensor(clips(2))
        with pytest.raises(ValueError) as error:
            extract(Features(), frames, ["", ""], ["fvd"], {"video": extractor})
        assert words in str(error.value)
