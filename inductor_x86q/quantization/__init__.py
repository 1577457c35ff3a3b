"""Which values are quantized: export, calibrate, convert; training."""
