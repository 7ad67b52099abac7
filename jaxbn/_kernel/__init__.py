"""The kernel: x, scale and bias in; y and moments out. Every norm is this kernel over other axes."""
