"""How things are measured: workloads, clocks, records."""
