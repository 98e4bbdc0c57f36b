"""What the library is compared with. Every path has the arguments of its op's `Impl.fn`."""
