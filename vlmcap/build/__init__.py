"""The composition root: a configuration becomes objects. Heavy imports stand inside the functions."""
