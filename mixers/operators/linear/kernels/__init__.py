"""Triton kernels of linear attention. Importing one imports triton: callers do it when a kernel is wanted."""
