"""Arithmetic: every operation a model needs, as Triton kernels and as plain torch. Imports only itself."""
