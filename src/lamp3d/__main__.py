"""``python -m lamp3d`` is the command line."""

from lamp3d.cli import main

main()
