"""Training runs: settings, directories, the training loop, checkpoints."""
