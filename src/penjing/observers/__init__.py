"""Observers: `fit(histogram, bits) -> (low, high)`, the range of an integer grid of inputs."""
