"""Language models: load, quantise, adapt, prompt."""
