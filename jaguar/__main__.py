"""`python -m jaguar` is `jaguar`."""

import sys

from jaguar.cli.commands import main

sys.exit(main())
