"""Reads clips and captions and makes batches of them: formats, decoding, feature cache, collation, resumable order."""
