"""Time and memory of one optimizer step at full architecture with random weights."""
