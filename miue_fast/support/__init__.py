"""What every room needs and no room is about: messages, ranges, streams, the modes of a call."""
