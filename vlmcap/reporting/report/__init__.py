"""Runs in one folder of tables, pictures and a page."""
