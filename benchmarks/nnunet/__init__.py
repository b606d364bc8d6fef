"""The engine beside nnU-Net's own predictor."""
