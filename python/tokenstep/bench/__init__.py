"""Side-by-side measurements: one file per op, each against its floor and its peers in the same run."""
