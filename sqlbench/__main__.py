"""The ``sqlbench`` command, as ``python -m sqlbench``."""

from sqlbench.cli import main

main()
