"""Model factories: each module has `build(...) -> keras.Model`."""
