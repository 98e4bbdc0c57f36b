"""Who serves which op: the registry, the importers of device code, and the checks of arguments."""
