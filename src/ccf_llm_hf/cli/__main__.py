"""`python -m ccf_llm_hf.cli`, where the `ccf-llm` script is not on the path."""

import sys

from ccf_llm_hf.cli.main import main

sys.exit(main())
