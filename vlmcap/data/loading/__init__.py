"""Clips into batches: decoding in a process of its own, lengths, order, padding or packing, loaders that resume."""
