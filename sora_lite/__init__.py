"""sora_lite: train video Diffusion Transformers, from raw videos to generated clips."""

__version__ = "0.1.0"
