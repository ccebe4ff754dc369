"""Records of a run: its folder, config, status, checkpoints, metrics."""
