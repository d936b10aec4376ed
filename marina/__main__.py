"""`python -m marina`, for where no script is installed."""

from marina.cli import main

main()
