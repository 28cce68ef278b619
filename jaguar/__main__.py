"""`python -m jaguar` is `jaguar`."""

import sys

from jaguar.cli.main import main

sys.exit(main())
