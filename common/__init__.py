"""What both sides share: the paper storey (no torch) and the tensor storey; see docs/architecture.md."""
