"""Diffusion: the path from data to noise, training times and loss, samplers and guidance. Pure functions of tensors."""
