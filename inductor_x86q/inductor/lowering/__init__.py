"""What Inductor makes of our operators."""
