"""``dtm-fast``, also as ``python -m dtm_fast``."""

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from dtm_fast.cli import main as run  # torch with it, which takes a second
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
