"""What the methods are made of: pure functions of tensors, which import torch alone."""
