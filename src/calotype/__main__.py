"""`python -m calotype` is `calotype`."""

from calotype.cli.main import main

main()
