"""Encoders, projectors, language models and the captioner that joins them; knows nothing of training or data."""
