"""Encoders, projectors, language models and the captioner that joins them; independent of training and data."""
