"""Runs `python -m jaxbn.diagnose`."""

import sys

from jaxbn.diagnose._command import main

sys.exit(main())
