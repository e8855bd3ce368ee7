"""The parts a mixer is chosen from."""
