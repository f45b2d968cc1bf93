"""A CNN on handwritten digits, federated by FedAvg."""
