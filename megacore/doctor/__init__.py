"""What a machine has, what is missing, why, and the line that fixes it."""
