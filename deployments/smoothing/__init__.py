"""Masks to surfaces, and pictures of them."""
