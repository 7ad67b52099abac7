"""The norms as pure functions, and what is done with their parameters and states."""
