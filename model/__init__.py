"""The swap-attention text-to-video model; it imports the shards' reader and nothing else of this project."""
