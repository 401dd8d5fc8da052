"""Makes batches of clips: isolated decoding, lengths, order, padding or packing, and loaders that can resume."""
