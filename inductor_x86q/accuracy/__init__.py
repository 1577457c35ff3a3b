"""What int8 costs in accuracy, layer by layer."""
