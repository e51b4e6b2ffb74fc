"""Settings every test relies on."""

import torch

# Workers are forked: a parent with an OpenMP pool would hand its children a pool without threads.
torch.set_num_threads(1)
# Fills what torch.empty and its kin return with NaN: memory read before it is written shows.
torch.use_deterministic_algorithms(True)
