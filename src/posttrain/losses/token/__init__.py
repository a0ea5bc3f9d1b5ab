"""Losses of `sft.loss`: a file each."""
