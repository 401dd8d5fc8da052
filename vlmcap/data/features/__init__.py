"""Stores the features of a frozen encoder on disk: computed once per clip, shared by runs, processes and machines."""
