"""Many runs as one: what becomes of each job, what is not run again, and how the next ones are chosen and started."""
