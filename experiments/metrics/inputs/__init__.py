"""What metrics are computed from, shared by all of them: predictions, generated and true images, feature networks."""
