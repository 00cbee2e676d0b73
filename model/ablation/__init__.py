"""The ablation: how spatial and temporal features meet, every way trained alike and scored alike, over several seeds."""
