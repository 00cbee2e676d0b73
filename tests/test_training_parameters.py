"""What is trained: groups, rates, adapters, counts, clipping and the moving average."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from videofactory.model.training.parameters import (
    averaged,
    build_optimizer,
    check_images,
    choose_trained,
    clip_gradients,
    count,
    count_table,
    kind_of,
    learning_rate_share,
    moving_average,
    parameter_groups,
    set_learning_rate,
    trained,
)
from videofactory.model.training.settings import EmaSettings, ModelSettings, OptimiserSettings
from videofactory.model.unet import SwapUNet

from .tiny_parents import image_model
from .tiny_unets import greatest_difference, inputs, predict, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = OptimiserSettings(learning_rate=0.5, weight_decay=0.25)


def model_settings(**values: Any) -> ModelSettings:
    return ModelSettings.model_validate({"start": "miniature", **values})


def learn(unet: SwapUNet, optimizer: torch.optim.Optimizer, frames: int = 3) -> None:
    sample, text = inputs(frames=frames)
    unet(sample, 321, text).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class TestKinds:
    def test_spatial_is_what_comes_from_an_image_model(self) -> None:
        model, info = SwapUNet.from_unet2d(image_model(), output_loading_info=True)
        assert {name for name, _ in model.named_parameters() if kind_of(name) == "spatial"} == set(info.copied)

    def test_every_kind_is_there(self) -> None:
        kinds = {name: kind_of(name) for name, _ in tiny_unet().named_parameters()}
        assert set(kinds.values()) == {"spatial", "temporal", "swap"}
        assert kinds["transformer_in.proj_in.weight"] == "temporal"
        assert kinds["mid_block.swap.attn.to_q.weight"] == "swap"


class TestChoice:
    def test_full_trains_everything(self) -> None:
        unet = tiny_unet()
        choose_trained(unet, model_settings())
        assert len(trained(unet)) == len(list(unet.parameters()))

    def test_frozen_layers_do_not_move(self) -> None:
        unet = tiny_unet()
        choose_trained(unet, model_settings(spatial="frozen"))
        before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
        learn(unet, build_optimizer(unet, RATE, "frozen"))
        for name, parameter in unet.named_parameters():
            assert torch.equal(parameter, before[name]) == (kind_of(name) == "spatial"), name
        with pytest.raises(ValueError, match="images would teach nothing"):
            check_images(unet)

    def test_adapters_train_alone_and_are_the_same_for_a_seed(self) -> None:
        settings = model_settings(train="lora", lora={"rank": 2, "alpha": 4, "targets": ["to_q", "net.2"]})
        made, state = [], torch.get_rng_state()
        for seed in (5, 5, 6):
            unet = tiny_unet()
            choose_trained(unet, settings, seed)
            made.append(unet)
        assert torch.equal(torch.get_rng_state(), state)
        names = set(trained(made[0]))
        assert names
        assert all(".lora_A.default" in name or ".lora_B.default" in name for name in names)
        assert all(any(target in name for target in ("to_q", "net.2")) for name in names)
        weights = [{name: parameter for name, parameter in trained(unet).items() if "lora_A" in name} for unet in made]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
        assert greatest_difference(predict(made[0], *inputs()), predict(tiny_unet(), *inputs())) <= 1e-6
        check_images(made[0])

    def test_adapters_of_new_layers_alone_learn_nothing_from_images(self) -> None:
        unet = tiny_unet()
        choose_trained(unet, model_settings(train="lora", lora={"targets": ["swap.attn.to_q"]}))
        assert {kind_of(name) for name in trained(unet)} == {"swap"}
        with pytest.raises(ValueError, match=r"add spatial layers to model\.lora\.targets"):
            check_images(unet)

    def test_a_target_that_no_layer_has_names_the_nearest(self) -> None:
        settings = model_settings(train="lora", lora={"targets": ["to_k", "to_qq"]})
        with pytest.raises(ValueError, match="holds 'to_qq', which is no layer of the U-Net; the nearest is 'to_q'"):
            choose_trained(tiny_unet(), settings)


class TestCounts:
    def test_add_up(self) -> None:
        unet = tiny_unet()
        choose_trained(unet, model_settings(spatial="frozen"))
        *kinds, everything = count(unet)
        assert [line.kind for line in kinds] == ["spatial", "swap", "temporal"]
        assert everything.trained + everything.frozen == sum(parameter.numel() for parameter in unet.parameters())
        assert (kinds[0].trained, kinds[1].frozen, kinds[2].frozen) == (0, 0, 0)
        assert everything.trained == kinds[1].trained + kinds[2].trained

    def test_name_adapters_and_line_up(self) -> None:
        unet = tiny_unet()
        choose_trained(unet, model_settings(train="lora"))
        lines = count_table(count(unet)).splitlines()
        assert [line.split("  ")[0].strip() for line in lines] == [
            "parameters",
            "spatial",
            "spatial adapters",
            "swap",
            "swap adapters",
            "temporal",
            "temporal adapters",
            "all",
        ]
        assert len({len(line) for line in lines}) == 1


class TestGroups:
    def test_hold_every_trained_parameter_once(self) -> None:
        unet = tiny_unet()
        groups = {group["name"]: group for group in parameter_groups(unet, RATE, 0.1)}
        assert set(groups) == {"spatial", "spatial, no decay", "new", "new, no decay"}
        held = [id(parameter) for group in groups.values() for parameter in group["params"]]
        assert sorted(held) == sorted(map(id, unet.parameters()))
        for name, group in groups.items():
            assert group["lr"] == pytest.approx(0.05 if "spatial" in name else 0.5)
            assert group["weight_decay"] == (0.0 if "no decay" in name else 0.25)

    def test_norms_and_biases_have_no_weight_decay(self) -> None:
        unet = tiny_unet()
        free = {id(p) for group in parameter_groups(unet, RATE) if not group["weight_decay"] for p in group["params"]}
        for name, module in unet.named_modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                assert all(id(parameter) in free for parameter in module.parameters()), name
            elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                assert id(module.weight) not in free, name
                assert module.bias is None or id(module.bias) in free, name

    def test_spatial_layers_move_less_by_their_factor(self) -> None:
        moved = {}
        for factor in (1.0, 0.1):
            unet = tiny_unet()
            before = unet.conv_out.weight.detach().clone(), unet.mid_block.swap.attn.to_q.weight.detach().clone()
            learn(unet, build_optimizer(unet, OptimiserSettings(learning_rate=1e-2, weight_decay=0.0), factor))
            after = unet.conv_out.weight, unet.mid_block.swap.attn.to_q.weight
            moved[factor] = [(new - old).abs().mean().item() for old, new in zip(before, after, strict=True)]
        assert moved[0.1][0] == pytest.approx(0.1 * moved[1.0][0], rel=1e-3)
        assert moved[0.1][1] == pytest.approx(moved[1.0][1], rel=1e-5)

    def test_need_something_to_train(self) -> None:
        with pytest.raises(ValueError, match="call choose_trained first"):
            parameter_groups(tiny_unet().requires_grad_(False), RATE)


class TestLearningRate:
    def shares(self, **settings: Any) -> list[float]:
        made = OptimiserSettings(**{"warmup_steps": 4, "final_share": 0.1, **settings})
        return [learning_rate_share(step, made, 20) for step in range(25)]

    def test_rises_in_a_line(self) -> None:
        for schedule in ("constant", "cosine", "linear"):
            assert self.shares(schedule=schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]

    def test_constant_stays(self) -> None:
        assert set(self.shares()[3:]) == {1.0}
        assert set(self.shares(warmup_steps=0)) == {1.0}

    @pytest.mark.parametrize("schedule", ["cosine", "linear"])
    def test_falls_to_its_end_and_stays_there(self, schedule: str) -> None:
        shares = self.shares(schedule=schedule)
        assert all(before > after for before, after in pairwise(shares[4:20]))
        assert shares[19:] == pytest.approx([0.1] * 6)
        middle = 4 + 15 / 3
        third = {"cosine": 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2, "linear": 0.1 + 0.9 * 2 / 3}
        assert shares[int(middle)] == pytest.approx(third[schedule])

    def test_is_set_in_every_group(self) -> None:
        optimizer = build_optimizer(tiny_unet(), RATE, 0.1)
        rates = set_learning_rate(optimizer, 0.5)
        assert rates == pytest.approx({"spatial": 0.025, "spatial, no decay": 0.025, "new": 0.25, "new, no decay": 0.25})
        assert set_learning_rate(optimizer, 1.0)["new"] == 0.5


class TestClipping:
    def gradients(self) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.zeros(size)) for size in (2, 3, 1)]
        parameters[0].grad, parameters[1].grad = torch.full((2,), 3.0), torch.full((3,), 4.0)
        return parameters

    def test_scales_to_the_limit_and_tells_what_was(self) -> None:
        parameters = self.gradients()
        norm = clip_gradients(parameters, 1.0)
        assert norm == pytest.approx(math.sqrt(66))
        assert clip_gradients(parameters, None) == pytest.approx(1.0, rel=1e-5)
        assert parameters[2].grad is None

    @pytest.mark.parametrize("limit", [None, 100.0])
    def test_leaves_short_gradients_alone(self, limit: float | None) -> None:
        parameters = self.gradients()
        clip_gradients(parameters, limit)
        assert [p.grad.max().item() for p in parameters[:2] if p.grad is not None] == [3.0, 4.0]


class TestAverage:
    @pytest.mark.parametrize("train", ["full", "lora"])
    def test_follows_its_formula(self, train: str) -> None:
        unet = tiny_unet()
        choose_trained(unet, model_settings(train=train))
        average = moving_average(unet, EmaSettings(decay=0.6, warmup_power=0.5))
        expected = [parameter.detach().clone() for parameter in trained(unet).values()]
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            share = min(0.6, 1 - (1 + step) ** -0.5)
            for index, parameter in enumerate(trained(unet).values()):
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                expected[index] = share * expected[index] + (1 - share) * parameter.detach()
            average.step(trained(unet).values())
        for found, wanted in zip(average.shadow_params, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)

    def test_is_in_place_inside_only_whatever_happens(self) -> None:
        unet = tiny_unet()
        choose_trained(unet, model_settings(spatial="frozen"))
        average = moving_average(unet, EmaSettings(decay=0.5))
        optimizer = build_optimizer(unet, RATE)
        for _ in range(3):
            learn(unet, optimizer)
            average.step(trained(unet).values())
        own = {name: weight.clone() for name, weight in unet.state_dict().items()}
        shadows = [shadow.clone() for shadow in average.shadow_params]
        with pytest.raises(KeyError), averaged(unet, average):
            assert all(torch.equal(*pair) for pair in zip(trained(unet).values(), shadows, strict=True))
            raise KeyError
        assert all(torch.equal(weight, own[name]) for name, weight in unet.state_dict().items())
        assert all(torch.equal(*pair) for pair in zip(average.shadow_params, shadows, strict=True))

    def test_of_another_model_is_refused_and_none_is_nothing(self) -> None:
        unet = tiny_unet()
        average = moving_average(unet, EmaSettings())
        choose_trained(unet, model_settings(spatial="frozen"))
        with pytest.raises(ValueError, match="made after choose_trained"), averaged(unet, average):
            pass
        with averaged(unet, None):
            pass
