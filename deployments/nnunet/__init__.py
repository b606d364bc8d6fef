"""Segmentation with nnU-Net models."""
