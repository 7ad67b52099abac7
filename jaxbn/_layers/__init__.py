"""What the Flax Linen and NNX layers share."""
