"""The embedded engine: in-process PyTorch with continuous batching."""
