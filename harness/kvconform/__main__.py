"""``python -m kvconform``."""

from kvconform.cli import main

if __name__ == "__main__":
    main()
