"""Ready-made grids: one plain Python file per question, each exposing `GRID`; `shared` has what they have in common."""
