"""Floor 4: the paper's grid of experiments, tasks and seeds, and the tables made of it."""
