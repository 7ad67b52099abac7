"""What the layers for Flax Linen and those for NNX share."""
