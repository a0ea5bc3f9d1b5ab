"""What posttrain finds by the entry points of pyproject.toml."""
