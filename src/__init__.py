"""LeNet-5 on MNIST: a PyTorch Lightning and Hydra research template."""
