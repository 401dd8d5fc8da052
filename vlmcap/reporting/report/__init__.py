"""Reports that compare runs: a page, tables and pictures."""
