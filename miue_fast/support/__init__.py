"""What every room needs and no room is about: messages, ranges, streams, modes of a call."""
