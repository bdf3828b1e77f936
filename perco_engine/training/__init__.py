"""Training: from photos to a model folder."""
