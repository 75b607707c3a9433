"""What needs a GPU: kernels and the loop, checked and timed; see `make gpu`."""
