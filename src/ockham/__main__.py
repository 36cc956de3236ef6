"""`python -m ockham` equals `ockham`."""

from ockham.cli.app import main

if __name__ == "__main__":
    main()
