"""The training loop and what it stands on: engine, optimizer settings, averaged weights, checkpoints, metrics."""
