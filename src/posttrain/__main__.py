"""`python -m posttrain` is the command `posttrain`."""

from posttrain.cli import main

main()
