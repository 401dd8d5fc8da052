"""The demo data set: procedural Korean background scenes as real H.264 clips with captions that state their facts."""
