"""Greedy decoding that keeps every row busy: finished captions leave at once, and waiting clips take their places."""
