"""`python -m jaguar.cli` is `jaguar`."""

import sys

from jaguar.cli import main

sys.exit(main())
