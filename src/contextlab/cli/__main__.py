"""`python -m contextlab.cli`."""

from contextlab.cli import main

if __name__ == "__main__":
    main()
