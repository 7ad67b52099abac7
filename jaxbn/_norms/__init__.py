"""The norms as pure functions of x, parameters and state."""
