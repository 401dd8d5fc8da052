"""Greedy decoding with continuous batching: a caption that has ended gives its slot to a clip that waits."""
