"""`python -m contextlab`: the command line, where its script is not on the path."""

from contextlab.cli import main

if __name__ == "__main__":
    main()
