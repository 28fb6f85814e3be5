"""``python -m tlcr``, which is also what ``accelerate launch -m tlcr`` starts in every process."""

import sys

from tlcr.cli.main import main

sys.exit(main())
