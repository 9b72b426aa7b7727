"""What torch's functions do to a volume that several ranks share: a file for each sort of operation."""
