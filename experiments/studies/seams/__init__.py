"""Seams of tiled decoding against decoding in one piece."""
