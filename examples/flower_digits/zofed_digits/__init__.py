"""A CNN on handwritten digits, federated by forward passes."""
