"""One reader a format, `read(layout) -> Stored`. Nothing in a file is executed."""
