"""Time and memory of one optimizer step at full size with random weights."""
