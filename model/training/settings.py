"""The sections of a training configuration: every setting with its meaning, unit, range and default, declared once.

`config.py` puts them together, reads them, and checks what no section can know by itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from videofactory.model.attention import Interaction

from . import options


def _as_tuple(value: Any) -> Any:
    """YAML knows lists only; settings that cannot change are tuples."""
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_as_tuple)
Number = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A group of settings: each of its declared type (no text for a number), none unknown, none changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Bucket(Section):
    """One size of samples, and how many of them make a batch of one process."""

    frames: int = Field(ge=1, le=options.LARGEST, description="frames per sample; 1 is an image, a random frame of a clip")
    height: int = Field(ge=16, le=options.LARGEST, description="in pixels; a multiple of 8")
    width: int = Field(ge=16, le=options.LARGEST, description="in pixels; a multiple of 8")
    batch: int = Field(ge=1, le=options.LARGEST, description="samples per process and forward pass")

    @model_validator(mode="after")
    def _whole_latents(self) -> Bucket:
        for name, size in (("height", self.height), ("width", self.width)):
            if size % options.FACTOR:
                below = size // options.FACTOR * options.FACTOR
                raise ValueError(
                    f"{name} {size} is no multiple of {options.FACTOR}, the pixels per latent position; "
                    f"take {below} or {below + options.FACTOR}"
                )
        return self

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width), in pixels."""
        return self.frames, self.height, self.width


class DataSettings(Section):
    """What is trained on, and how it becomes batches."""

    dataset: str = Field(description="a dataset of clips: a folder, or an object-store URI")
    split: Literal["train", "val", "test"] | None = Field(
        "train", description="split of the dataset to train on; all of it when null"
    )
    where: str | None = Field(None, description="SQL condition on the columns of clips; only clips for which it is true are used")
    fps: Annotated[Number, Field(gt=0, le=1000)] | None = Field(
        8.0, description="frames per second at which frames are taken from a clip; null spreads them over the whole clip"
    )
    buckets: Annotated[tuple[Bucket, ...], AsTuple] = Field(
        min_length=1, description="the sizes of samples; a clip goes to the bucket that fits it best"
    )
    image_share: Number = Field(0.0, ge=0, le=1, description="share of steps that are images, for buckets of 1 frame")
    max_upscale: Number = Field(
        1.0, ge=1e-3, le=1e3, description="factor up to which a smaller clip is enlarged to fit a bucket; 1 enlarges none"
    )
    max_aspect_change: Number = Field(
        1.5, ge=1, description="factor between the aspect ratios of clip and bucket up to which a clip is cropped to fit"
    )
    captions: Annotated[tuple[str, ...], AsTuple] = Field(
        ("caption",),
        min_length=1,
        description="where captions come from: `caption`, the column of the clips, and `SIDECAR.COLUMN`, the column of the tables "
        "`index/SIDECAR`, by `clip_id`. Of several captions of a clip, one is drawn per visit",
    )
    uncaptioned: Literal["drop", "empty"] = Field("drop", description="clips without a caption: left out, or with the empty text")
    caption_dropout: Number = Field(
        0.1, ge=0, le=1, description="probability that a caption is replaced by the empty text, which guidance needs"
    )
    flip: bool = Field(
        False, description="mirror every other sample, by chance; captions that say left or right, and letters, become wrong"
    )
    order: Literal["shuffled", "shards"] = Field(
        "shuffled",
        description="`shuffled`: clips in any order, by random access; `shards`: shards in random order, and clips shuffled within "
        "`window` of them, so that few files are read at a time",
    )
    window: int = Field(8, ge=1, description="shards that are shuffled together where the order is `shards`")
    workers: int = Field(
        4, ge=0, le=1024, description="processes per training process that read and decode; 0 does it in the trainer"
    )
    prefetch: int = Field(2, ge=1, description="batches that each of them holds ready")
    decode_threads: int = Field(1, ge=1, le=1024, description="threads of one decoder")
    max_bad_fraction: Number = Field(
        0.01,
        ge=0,
        le=1,
        description="share of clips (but at least 10 of them) that may be unreadable, and are skipped, before training ends with an "
        "error",
    )
    latents: str | None = Field(
        None, description="folder of latents that `videofactory.model.precompute` made; made while training when null"
    )

    def loaded_buckets(self) -> tuple[options.Bucket, ...]:
        """The buckets as the data loader takes them."""
        return tuple(options.Bucket(*bucket.size, bucket.batch, self.fps) for bucket in self.buckets)

    def loading(self, seed: int, **changes: Any) -> options.DataOptions:
        """All other settings as the data loader takes them; `changes` replaces some, for example `split="val"`."""
        named = {name for name in options.DataOptions.__dataclass_fields__ if name in type(self).model_fields}
        return options.DataOptions(**{"seed": seed, **{name: getattr(self, name) for name in named}, **changes})

    @property
    def images(self) -> tuple[Bucket, ...]:
        """The buckets of one frame."""
        return tuple(bucket for bucket in self.buckets if bucket.frames == 1)

    @model_validator(mode="after")
    def _buckets_and_share_agree(self) -> DataSettings:
        sizes = [bucket.size for bucket in self.buckets]
        if twice := next((size for size in sizes if sizes.count(size) > 1), None):
            raise ValueError(f"two buckets have the size {'x'.join(map(str, twice))} (frames, height, width); keep one of them")
        videos = len(self.buckets) - len(self.images)
        if self.image_share > 0 and not self.images:
            raise ValueError(
                f"image_share is {self.image_share} and no bucket has frames 1; add such a bucket, or set image_share to 0"
            )
        if self.image_share == 0 and self.images:
            raise ValueError("a bucket has frames 1 and image_share is 0, so it would stay empty; raise image_share, or drop it")
        if self.image_share == 1 and videos:
            raise ValueError("image_share is 1 and a bucket has more than one frame, so it would stay empty; lower image_share")
        if self.image_share < 1 and not videos:
            raise ValueError(
                f"image_share is {self.image_share} and every bucket has frames 1; set it to 1, or add a video bucket"
            )
        return self


class StartSettings(Section):
    """Where the U-Net begins; exactly one of the first three. A text alone means `saved`."""

    saved: str | None = Field(
        None, description="a saved pipeline or U-Net of this package: folder or Hub id; `miniature` is the tiny one, untrained"
    )
    image_model: str | None = Field(
        None, description="a Stable Diffusion pipeline, 1.x or 2.x: folder or Hub id; `miniature` is the tiny one"
    )
    video_model: str | None = Field(None, description="a ModelScope text-to-video pipeline: folder or Hub id")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    variant: str | None = Field(None, description="variant of the weights' files, for example fp16")

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_saved_model(cls, value: Any) -> Any:
        return {"saved": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> StartSettings:
        given = {name: value for name in ("saved", "image_model", "video_model") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            found = " and ".join(f"{name} {value!r}" for name, value in given.items()) or "nothing"
            raise ValueError(f"exactly one of saved, image_model and video_model is wanted, and {found} is given")
        return self


class LoraSettings(Section):
    """Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, description="rank of the update of every adapted layer")
    alpha: int = Field(16, ge=1, description="the update is scaled by alpha / rank")
    targets: Annotated[tuple[str, ...], AsTuple] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="layers that get an adapter: the last part of their names, or more of it (`swap.attn.to_q`)",
    )


class ModelSettings(Section):
    """Which weights training starts from, and which of them it changes."""

    start: StartSettings = Field(description="where the U-Net begins")
    components: str | None = Field(
        None,
        description="pipeline that gives VAE, text encoder, tokenizer and scheduler: folder or Hub id; that of `start` when null",
    )
    interaction: Interaction | None = Field(
        None, description="how space and time meet at the end of a block, see `SwapUNet`; as in `start` when null"
    )
    swap_windows: Annotated[tuple[Annotated[tuple[int, int, int], AsTuple], ...], AsTuple] | None = Field(
        None, description="largest window (frames, height, width) per level, in latent positions; as in `start` when null"
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        None, description="probability of dropout inside the layers; as in `start` when null"
    )
    train: Literal["full", "lora"] = Field("full", description="`full`: the weights themselves; `lora`: adapters beside them")
    lora: LoraSettings | None = Field(None, description="the adapters; only with `train: lora`")
    spatial: Literal["trained", "frozen"] | Annotated[Number, Field(gt=0)] = Field(
        "trained",
        description="layers that come from the image model: trained like the new ones, frozen, or at this multiple of the "
        "learning rate",
    )

    @model_validator(mode="before")
    @classmethod
    def _adapters_by_default(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("train") == "lora" and value.get("lora") is None:
            return {**value, "lora": {}}
        return value

    @model_validator(mode="after")
    def _adapters_and_weights_agree(self) -> ModelSettings:
        if self.train == "full" and self.lora is not None:
            raise ValueError("lora is given and train is 'full', which has no adapters; set train to lora, or lora to null")
        if self.train == "lora" and self.spatial != "trained":
            raise ValueError(
                f"spatial is {self.spatial!r} and train is 'lora', which freezes every weight; choose the adapted layers with "
                "lora.targets instead, for example [swap.attn.to_q, swap.attn.to_v]"
            )
        return self

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings of `SwapUNet` that are given here."""
        chosen = {"interaction": self.interaction, "swap_windows": self.swap_windows, "dropout": self.dropout}
        return {name: value for name, value in chosen.items() if value is not None}


class NoiseSettings(Section):
    """The diffusion process and its loss."""

    prediction: Literal["epsilon", "v_prediction"] = Field(
        "epsilon",
        description="what the U-Net predicts: the noise, or the velocity (Salimans & Ho 2022); as its start was trained",
    )
    min_snr_gamma: Annotated[Number, Field(gt=0)] | None = Field(
        None,
        description="steps whose signal-to-noise ratio exceeds this weigh less (min-SNR, Hang et al. 2023: 5); off when null",
    )
    zero_terminal_snr: bool = Field(
        False, description="the last step is pure noise (Lin et al. 2023); needs `prediction: v_prediction`"
    )
    offset_noise: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="strength of noise that is constant over a picture, which teaches brightness; 0.05 to 0.1 is usual",
    )
    offset_noise_per: Literal["clip", "frame"] = Field(
        "clip", description="whether that noise is the same for all frames of a clip; one per frame teaches flicker too"
    )

    @model_validator(mode="after")
    def _terminal_step_can_be_predicted(self) -> NoiseSettings:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            also = f", and min_snr_gamma {self.min_snr_gamma:g} divides by its ratio of 0" if self.min_snr_gamma else ""
            raise ValueError(
                "zero_terminal_snr is true and prediction is 'epsilon': of pure noise the noise is known, and nothing is learned"
                f"{also}; set prediction to v_prediction, or zero_terminal_snr to false"
            )
        return self


class OptimiserSettings(Section):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), its learning rate over time, and what precedes a step."""

    learning_rate: Number = Field(1e-4, gt=0, description="at its highest, of the new layers")
    betas: Annotated[tuple[Number, Number], AsTuple] = Field(
        (0.9, 0.999), description="decay of the averages of gradient and squared gradient; each from 0, below 1"
    )
    weight_decay: Number = Field(1e-2, ge=0, description="of weights; biases and norms have none")
    eps: Number = Field(1e-8, gt=0, description="added to the denominator")
    warmup_steps: int = Field(500, ge=0, description="steps over which the learning rate rises from nothing, in a line")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="the learning rate after that: as it is, half a cosine, or a line, down to `final_share`"
    )
    final_share: Number = Field(
        0.0, ge=0, le=1, description="share of the learning rate at the last step, where the schedule falls"
    )
    clip_norm: Annotated[Number, Field(gt=0)] | None = Field(
        1.0, description="longest gradient, as the norm over all parameters; longer ones are scaled down; no limit when null"
    )
    accumulate: int = Field(1, ge=1, description="batches per step and process, whose gradients are averaged")

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each of the two is from 0 and below 1, for example [0.9, 0.999]")
        return betas


class EmaSettings(Section):
    """A moving average of the trained weights, which is what validation and generation use."""

    decay: Number = Field(0.9999, ge=0, lt=1, description="share of the average that stays at a step, at its highest")
    warmup_power: Number = Field(
        0.75, gt=0, le=1, description="at step n the share is at most 1 - (1 + n)^-power; 0.75 suits less than a million steps"
    )


class CheckpointSettings(Section):
    """When the state of training is written, and which of these states stay."""

    every: int = Field(1000, ge=1, description="steps between checkpoints; the last step has one anyway")
    keep: int | None = Field(2, ge=1, description="latest checkpoints that stay; all when null")
    keep_every: int | None = Field(
        None, ge=1, description="checkpoints at multiples of this step stay, too; a multiple of `every`"
    )

    @model_validator(mode="after")
    def _kept_ones_are_written(self) -> CheckpointSettings:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of every {self.every}, so there may be nothing to keep; "
                f"take {self.every * max(1, round(self.keep_every / self.every))}"
            )
        return self


class ValidationSettings(Section):
    """What is measured and drawn while training; with the moving average where there is one."""

    every: int = Field(1000, ge=1, description="steps between validations; the last step has one anyway")
    prompts: Annotated[tuple[str, ...], AsTuple] = Field(
        (), description="texts to make videos of, in the size of the first video bucket"
    )
    videos: int = Field(1, ge=1, description="videos per prompt; the same noise every time")
    guidance_scale: Number = Field(7.5, ge=0, description="strength of the text, as the pipeline's; above 1 to have any")
    guidance_rescale: Number = Field(
        0.0, ge=0, le=1, description="share of guidance scaled back, against overexposure; 0.7 with `zero_terminal_snr`"
    )
    steps: int = Field(25, ge=1, description="denoising steps per video")
    fps: Number = Field(8.0, gt=0, description="frames per second of the files")
    split: Literal["train", "val", "test"] | None = Field(
        "val", description="split whose loss is measured, with noise that is the same every time; none when null"
    )
    timesteps: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AsTuple] = Field(
        (50, 250, 500, 750, 950), min_length=1, description="time steps at which it is measured; each below the scheduler's, 1000"
    )
    clips: int = Field(64, ge=1, description="clips of the split, at most, for each bucket")

    @model_validator(mode="after")
    def _something_to_do(self) -> ValidationSettings:
        if not self.prompts and self.split is None:
            raise ValueError(
                "there are no prompts and split is null, so there is nothing to do; set validation to null, or give one"
            )
        return self


class LogSettings(Section):
    """Numbers on their way out."""

    every: int = Field(10, ge=1, description="steps between lines; numbers in between are averaged on the device")
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], AsTuple] = Field(
        (), description="where numbers go besides the log file in `output`; each needs its package"
    )
    project: str = Field("videofactory", description="name of the project at trackers that have projects")
