"""How the demonstration models in `models/` were trained: `python -m models.training.train`."""
