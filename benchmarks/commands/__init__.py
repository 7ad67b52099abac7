"""A module for each subcommand: its docstring and `add_arguments`, if any, make its help, and `run` does the work."""
