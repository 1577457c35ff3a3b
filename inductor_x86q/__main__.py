"""`python -m inductor_x86q` is `x86q`."""

import sys

from inductor_x86q.cli import main

sys.exit(main())
