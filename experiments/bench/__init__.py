"""What mixers cost on the machine at hand."""
