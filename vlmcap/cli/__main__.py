"""`python -m vlmcap.cli`, where the installed command is not on the path."""

from __future__ import annotations

from vlmcap.cli import main

main()
