"""Evidence: what the results are made with. README.md says which command makes which file."""
