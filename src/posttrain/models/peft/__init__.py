"""Adapters: how they are put on a model, trained, written and merged."""

import warnings

# peft 0.21.2 asks for it by the name that transformers 5.24 has given up, once a model; nothing that a user could change
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
