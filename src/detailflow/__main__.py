"""`python -m detailflow` is the command line."""

import sys

from detailflow.cli.main import main

sys.exit(main())
