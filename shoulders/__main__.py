"""``python -m shoulders``: the command line, as torchrun needs it."""

from shoulders.cli import main

main()
