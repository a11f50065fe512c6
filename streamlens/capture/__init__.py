"""Taking artifacts from a PyTorch run, by hooks alone."""
