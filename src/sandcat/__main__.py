"""`python -m sandcat` is the command line, too."""

from sandcat.cli import main

main()
