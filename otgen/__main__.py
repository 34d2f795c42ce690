"""``python -m otgen``: the command line."""

from otgen.cli import main

main()
