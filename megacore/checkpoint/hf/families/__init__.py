"""A file for each family of models: where its weights lie in HF's tensors, and what its config.json says."""
