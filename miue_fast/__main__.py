"""`python -m miue_fast` is `miue-fast`."""

import sys

from .cli import main

sys.exit(main())
