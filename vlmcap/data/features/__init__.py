"""Features of a frozen encoder on disk: computed once a clip, shared by runs, processes and machines."""
