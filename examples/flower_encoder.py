"""A Hugging Face encoder federated in a subspace: short texts of three kinds on four nodes, an app in one file.

python examples/flower_encoder.py FOLDER

The encoder is small and drawn here, so that nothing is downloaded; `AutoModelForSequenceClassification.from_pretrained`
takes its place. Its own loss is used, on batches that a collate function pads.
"""

import sys
from pathlib import Path

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from zofed.flower import Client, Strategy, simulate

WORDS, PAD = 64, 0


def encoder() -> nn.Module:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3, pad_token_id=PAD,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()  # dropout off: a loss must be one number at the same weights


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def texts(count: int, seed: int) -> list[dict[str, list[int] | int]]:
    """Ids of 4 to 12 words each, a third of them from the list of its kind."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        kind, length = (int(torch.randint(0, high, (), generator=drawn)) for high in (3, 9))
        ids = torch.randint(1, WORDS, (4 + length,), generator=drawn)
        own = torch.rand(4 + length, generator=drawn) < 1 / 3
        ids[own] = 1 + kind * 5 + ids[own] % 5
        found.append({"ids": ids.tolist(), "label": kind})
    return found


def padded(some: list) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text["ids"]) for text in some], batch_first=True, padding_value=PAD)
    labels = torch.tensor([text["label"] for text in some])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def loader(context: Context) -> DataLoader:
    """What one node holds."""
    return DataLoader(texts(100, seed=1 + int(context.node_config["partition-id"])), collate_fn=padded)


def scores(model: nn.Module, batches) -> dict[str, float]:
    right = torch.cat([model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches])
    return {"accuracy": float(right.float().mean())}


client_app = Client(encoder, loss, loader).add_to(ClientApp())
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    held_out = DataLoader(texts(200, seed=0), collate_fn=padded)
    found = Strategy(encoder, loss, held_out, metrics=scores).start(grid, context)
    print(f"accuracy {found.summary['accuracy']:.3f}, each client's weights {found.summary['digest'][:16]}")


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/encoder").absolute()
    settings = {
        "mode": "subspace", "subspace-size": 256, "subspace-interval": 8, "optimizer": "adamw", "rounds": 20,
        "learning-rate": 0.03, "batch-size": 16, "out": str(out),
    }  # fmt: skip
    simulate(server_app, client_app, 4, {f"zofed.{key}": value for key, value in settings.items()})
