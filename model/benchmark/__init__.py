"""Measures our U-Net against diffusers' UNet3DConditionModel: `python -m videofactory.model.benchmark`."""
