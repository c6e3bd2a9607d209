"""Loops over examples: Lightning predict loops, measurements, checkpoints, racing."""
