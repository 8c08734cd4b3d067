"""`python -m app.cli`, the same as `graft`."""

from app.cli.root import main

main()
