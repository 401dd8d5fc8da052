"""Clips and captions on disk into batches: layouts, decoding, feature cache, collation, resumable order."""
