"""The client: some epochs of its own images, and the weights that come of it."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedavg_digits.task import Net, load_data, train

app = ClientApp()


@app.train()
def train_here(message: Message, context: Context) -> Message:
    net, loader = Net(), load_data(context)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(net, loader, context.run_config["local-epochs"], context.run_config["learning-rate"])
    metrics = MetricRecord({"loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
