"""Checkpoints as they are released: their files, and the formats in which their weights may be kept in fewer bits."""
