"""``python -m kvconform``."""

from kvconform.cli.main import main

if __name__ == "__main__":
    main()
