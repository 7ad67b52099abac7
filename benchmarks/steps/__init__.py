"""What `python -m benchmarks steps` measures, a module for each part."""
