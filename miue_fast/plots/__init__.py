"""What is drawn with matplotlib for a poison; the figures of a report build on it."""
