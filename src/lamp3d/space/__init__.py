"""Volumes that several ranks share: what torch's functions do to them, a file for each sort of operation."""
