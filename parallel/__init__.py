"""The grid of ranks: who holds what, and how they talk. Imports `kernels` and itself."""
