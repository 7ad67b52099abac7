"""Running a Flax model while every call of its norm layers is observed."""
