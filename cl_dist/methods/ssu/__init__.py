"""Source-shielded updates: freezes the input columns that matter most on samples of the source."""
