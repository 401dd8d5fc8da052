"""Files into frames: which moments, which decoder, what a file may not do."""
