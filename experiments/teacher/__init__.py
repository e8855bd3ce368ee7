"""The embedded teacher: a tiny Stable Diffusion of our own training, and the recipe that made it."""
