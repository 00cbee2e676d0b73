"""`python -m videofactory.model.miniature.image_model`: keep the U-Net that `train miniature-image` made, as an image model of diffusers.

A U-Net that was trained on images alone has learned nothing over time. Its spatial layers are those of diffusers'
`UNet2DConditionModel` under the same names, and are stored as one, in half precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from videofactory.model.miniature import IMAGE_MODEL, WEIGHTS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def image_model(unet: Any) -> UNet2DConditionModel:
    """The image model whose weights the spatial layers of a `SwapUNet` are.

    Raises:
        ValueError: the layers do not fit an image model.
    """
    from diffusers import UNet2DConditionModel

    config = unet.config
    kinds = ["CrossAttn" if attends else "" for attends in config.attention_levels]
    dims = config.attention_head_dim
    dims = [dims] * len(kinds) if isinstance(dims, int) else dims
    made: Any = UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        layers_per_block=config.layers_per_block,
        # Named after their width, it is the number of the heads.
        attention_head_dim=tuple(channels // dim for channels, dim in zip(config.block_out_channels, dims, strict=True)),
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        use_linear_projection=True,
    )
    given = unet.state_dict()
    missing = [name for name in made.state_dict() if name not in given]
    if missing:
        raise ValueError(f"the U-Net lacks {len(missing)} weights of an image model, first {missing[0]}")
    made.load_state_dict({name: given[name] for name in made.state_dict()})
    return made.eval()


def main(
    run: Annotated[Path, typer.Option(help="Folder of a finished run of `train miniature-image`.")] = Path(
        "runs/miniature-image"
    ),
    out: Annotated[Path, typer.Option(help="Where the image model goes; by default among our weights.")] = WEIGHTS / IMAGE_MODEL,
) -> None:
    """Store the U-Net of a run on images as an image model of diffusers."""
    from videofactory.model.unet import SwapUNet

    made = image_model(SwapUNet.from_pretrained(run / "pipeline", subfolder="unet"))
    made.half().save_pretrained(out, safe_serialization=True)


if __name__ == "__main__":
    typer.run(main)
