"""``python -m dtm_fast`` is ``dtm-fast``."""

from dtm_fast.cli import main

main()
