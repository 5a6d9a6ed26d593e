"""``dtm-fast``, also as ``python -m dtm_fast``."""

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from dtm_fast.cli import main as run  # torch and transformers with it, which takes seconds
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
