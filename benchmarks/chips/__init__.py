"""Programs for chips that this machine does not have: which they are, compiling them, and reading their figures."""
