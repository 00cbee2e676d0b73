"""Training the swap-attention U-Net: settings, data, objective, parameters and checkpoints."""
