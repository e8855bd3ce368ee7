"""Diffusion transformers, one file per family."""
