"""Masks to masks."""
