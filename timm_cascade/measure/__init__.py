"""What a cascade does: confidence and correctness at every exit, accuracy and cost at its thresholds, time by parts."""
