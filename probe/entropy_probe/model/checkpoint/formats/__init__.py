"""Formats whose weights and moments lie in pieces, a file each."""
