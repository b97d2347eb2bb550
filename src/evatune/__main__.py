"""`python -m evatune`, which is also what `torchrun -m evatune` starts."""

from __future__ import annotations

import sys

from evatune.cli.main import main

sys.exit(main())
