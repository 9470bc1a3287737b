"""What the package reads: the CUDA version that chooses its native file."""

cuda = "13.0"
hip = None
