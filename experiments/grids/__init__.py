"""Ready-made grids: one plain Python file per question, each exposing `GRID`."""
