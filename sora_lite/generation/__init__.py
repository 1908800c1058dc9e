"""Inference: exported models, and clips drawn from them. Needs no DeepSpeed."""
