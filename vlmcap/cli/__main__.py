"""`python -m vlmcap.cli`, for environments where the installed command is not on the path."""

from __future__ import annotations

from vlmcap.cli import main

main()
