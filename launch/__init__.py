"""Programs: the only place with flags and output."""
