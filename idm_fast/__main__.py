"""``python -m idm_fast`` is ``idm-fast``."""

import sys

from idm_fast.cli import main

sys.exit(main())
