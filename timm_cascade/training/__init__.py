"""Training exit heads on the features of a frozen backbone, with Accelerate."""
