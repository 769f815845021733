"""Floor 3, distillation: recipes, losses, calibration, stages, the run."""
