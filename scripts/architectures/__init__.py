"""Every causal language model of transformers, made tiny, tried in all stages, and written down: scripts/models_matrix.py."""
