"""Decodes video and image files into frames: the choice of moments and decoder, and limits on untrusted files."""
