"""Weights and adapters as MLX has them, whose reader for language models is mlx-lm."""
