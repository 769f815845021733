"""``python -m inhibitor``."""

from inhibitor.cli import main

main()
