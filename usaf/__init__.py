"""USAF, Ultra Sparse Adaptive Fine-Tuning: trains about 0.5% of an MoE model's own weights, and its routers."""

__version__ = "0.1.0"
