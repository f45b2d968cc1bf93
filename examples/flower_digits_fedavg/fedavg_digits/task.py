"""The CNN, its data, its training and its scores."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset


class Net(nn.Module):
    """Images (n, 1, 8, 8) to scores of ten digits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, images):
        found = F.max_pool2d(F.relu(self.conv1(images)), 2)
        found = F.max_pool2d(F.relu(self.conv2(found)), 2)
        return self.head(found.flatten(1))


def digits():
    """1,437 images for the clients and 360 for the server; pixels from 0 to 1."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(found.target))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(dataset, order[360:]), Subset(dataset, order[:360])


def load_data(context):
    """What one client holds: two stretches of the images in the order of their labels, so two to four digits."""
    partition, partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    train, _ = digits()
    labels = torch.stack([label for _, label in train])
    stretches = labels.argsort(stable=True).chunk(2 * partitions)
    own = torch.cat([stretches[partition], stretches[partition + partitions]]).tolist()
    return DataLoader(Subset(train, own), batch_size=16, shuffle=True)


def train(net, loader, epochs, learning_rate):
    """The mean loss on the way."""
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    losses = []
    net.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net, loader):
    """Of the images that the loader gives."""
    with torch.no_grad():
        right = torch.cat([net(images).argmax(-1) == labels for images, labels in loader])
    return {"accuracy": float(right.float().mean())}
