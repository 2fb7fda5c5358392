"""`python -m hf_schedulefree` is the command `hf-schedulefree`."""

import sys

from hf_schedulefree.cli import main

sys.exit(main())
