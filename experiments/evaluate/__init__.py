"""Evaluation of one student: all its metrics, samples and mixing matrices, under a frozen protocol."""
