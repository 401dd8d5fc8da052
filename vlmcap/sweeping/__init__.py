"""Sweeps: which jobs are run and how they are started, their results, and which of them need not run again."""
