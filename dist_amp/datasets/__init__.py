"""TFDS builders for data that needs no network."""
