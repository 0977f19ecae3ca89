"""`python -m ties_peft`: the command line."""

from .cli import main

main()
