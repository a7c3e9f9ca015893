"""`python -m fedlora_mini.cli` is `fedlora`."""

import sys

from fedlora_mini.cli import main

sys.exit(main())
