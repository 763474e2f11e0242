"""``python -m evenkeel``, and ``torchrun -m evenkeel``."""

import sys

from evenkeel.cli import main

sys.exit(main())
