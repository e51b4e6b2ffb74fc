"""Settings every test relies on."""

import torch

# Workers are forked: a parent with an OpenMP pool would hand its children a pool without threads.
torch.set_num_threads(1)
