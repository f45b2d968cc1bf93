"""A module of a person's own in their own Flower app: the same rounds, journal, checks and files as a task has."""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federations import Meddling, Quick, assert_one_model, federate, records_of
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zofed
from zofed.base.errors import UserError
from zofed.core import journal, sanitize
from zofed.federated import messages
from zofed.federated.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from zofed.federated.protocol import Answer
from zofed.federated.wire import Evaluation
from zofed.flower import Client, Result, Strategy, simulate
from zofed.models import spec
from zofed.runs import repair
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import own_settings
from zofed.training.own_module import OwnModule
from zofed.training.task import Task

pytestmark = pytest.mark.usefixtures("no_waiting")

CLASSES, WIDTH = 4, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def accuracy(model: nn.Module, batches: Any) -> dict[str, float]:
    right = torch.cat([model(x).argmax(-1) == y for x, y in batches])
    return {"accuracy": float(right.float().mean()), "wrong": int((~right).sum())}


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, WIDTH) and their class, which a linear map of them decides."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=drawn)
    return x, x[:, :CLASSES].argmax(-1)


def own_points(context: Context) -> tuple[Tensor, Tensor]:
    return points(40 + 8 * int(context.node_config["partition-id"]), seed=1 + int(context.node_config["partition-id"]))


BASE: dict[str, Any] = {"rounds": 4, "queries": 4, "batch-size": 8, "eval-interval": 2, "learning-rate": 0.05}


def in_app(values: Mapping[str, Any], out: Path) -> dict[str, Any]:
    return {f"zofed.{key}": value for key, value in {**BASE, **values, "out": str(out)}.items()}


class Nodes(Meddling):
    """Nodes of an app of one's own; some may run another one. others: by their places."""

    def __init__(
        self, run_config: dict[str, Any], nodes: int = 2, app: Any = None, others: Mapping[int, Any] | None = None
    ) -> None:
        LocalGrid.__init__(self, app or Client(Net, loss, own_points).add_to(ClientApp()), nodes, run_config)
        self.before, self.alter, self.plans = (lambda _, __: None), (lambda _, __, reply: reply), []
        own = self._app

        def forward(message: Message, context: Context) -> Message:
            return (others or {}).get(int(context.node_config["partition-id"]), own)(message, context)

        self._forward, self._app = forward, self._meddled  # type: ignore[assignment]


def strategy(**changes: Any) -> Strategy:
    return Strategy(**{"model": Net, "loss": loss, "held_out": points(64, 0), "metrics": accuracy} | changes)


def start(values: Mapping[str, Any], out: Path, nodes: int = 2, grid: LocalGrid | None = None, **own: Any) -> Result:
    run_config = in_app(values, out)
    grid = grid or Nodes(run_config, nodes)
    return strategy(**own).start(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), run_config))


# --- ways of training ---

WAYS: dict[str, dict[str, Any]] = {
    "zo": {},
    "zo local": {"local-steps": 2, "steps-per-message": 2, "direction-scale": "rms"},
    "zo per query": {"query-batches": "per-query", "query-batch-size": 3},
    "zo shared": {"direction-seeds": "shared", "aggregation": "median", "directions": "gaussian"},
    "core": {"mode": "subspace", "optimizer": "adamw", "subspace-size": 9, "subspace-interval": 2},
    "diagonal": {"mode": "subspace", "subspace-variant": "diagonal", "subspace-size": 6, "subspace-interval": 2},
    "fo": {"mode": "fo", "local-steps": 3, "learning-rate": 0.1},
    "fo mudamw": {"mode": "fo", "optimizer": "mudamw"},
    "calibrate": {"mode": "calibrate", "bp-interval": 2},
    "instruct": {"mode": "instruct", "bp-interval": 2},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_of_training_ends_with_one_module(tmp_path: Path, way: dict[str, Any]) -> None:
    found = start(way, tmp_path / "run", 3)
    assert_one_model(found.summary, [0, 1, 2])
    assert [entry.record.round for entry in journal.read(found.folder / "journal.zofed").entries] == [1, 2, 3, 4]
    model = Net()
    model.load_state_dict(found.arrays.to_torch_state_dict())
    assert float(loss(model, points(64, 0))) == pytest.approx(found.summary["eval_loss_end"], rel=1e-5)
    assert found.summary["digest"] != journal.read(found.folder / "journal.zofed").genesis["weights"]
    assert found.summary["tokens"] == 0


@pytest.mark.parametrize("way", ["zo", "core", "fo"])
def test_it_learns(tmp_path: Path, way: str) -> None:
    longer = {"rounds": 30 if way == "zo" else 12, "queries": 8, "eval-interval": 50, "subspace-interval": 8}
    found = start(WAYS[way] | longer | {"learning-rate": 0.2 if way == "fo" else 0.1}, tmp_path / "run", 3)
    assert found.summary["eval_loss_end"] < found.summary["eval_loss_start"] - 0.2


def test_the_journal_rebuilds_the_module_that_one_seed_makes(tmp_path: Path) -> None:
    found = start({"seed": 5}, tmp_path / "run")
    torch.manual_seed(5)
    assert zofed.replay(Net(), found.folder / "journal.zofed") == found.summary["digest"]
    torch.manual_seed(6)
    with pytest.raises(UserError, match="give the model the run began with"):
        zofed.replay(Net(), found.folder / "journal.zofed")


def test_where_torch_draws_next_does_not_change(tmp_path: Path) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    OwnModule(Net, loss).built(7)
    assert torch.equal(torch.rand(3), wanted)


def test_a_task_in_an_app_gives_the_records_and_weights_of_the_command(quick: Quick, tmp_path: Path) -> None:
    """The very rounds of `zofed simulate`: its model, its loss and its clients' examples, handed over as one's own."""
    settings = quick(rounds=4, queries=4, client_held_out_fraction=0.0)
    summary = federate(settings, tmp_path / "command", 2)
    task = Task.load(settings)
    changed = {key: value for key, value in settings.model_dump(by_alias=True).items() if key in BASE or key == "seed"}

    def model_loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    def build() -> nn.Module:
        return spec.create_model(settings, task.tokenizer, 0)

    def data(context: Context) -> Any:
        return task.shard(int(context.node_config["partition-id"]), 2)

    app = Client(build, model_loss, data).add_to(ClientApp())
    run_config = in_app(changed | {"eval-examples": settings.eval_examples}, tmp_path / "app")
    grid = LocalGrid(app, 2, run_config)
    own = Strategy(build, model_loss, task.held_out_sample.examples)
    found = own.start(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), run_config))
    assert found.summary["digest"] == summary["digest"]
    records = [
        [entry.record for entry in journal.read(tmp_path / at / "journal.zofed").entries] for at in ("command", "app")
    ]
    assert records[0] == records[1]


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataset": lambda x, y: TensorDataset(x, y),
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True),
    "list of examples": lambda x, y: list(zip(x, y, strict=True)),
    "own collate": lambda x, y: DataLoader(
        list(range(len(x))), batch_size=2, collate_fn=lambda chosen: (x[chosen], y[chosen])
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_form_of_the_data_changes_nothing(tmp_path: Path, form: Callable[[Tensor, Tensor], Any]) -> None:
    plain = start({"query-batches": "per-query"}, tmp_path / "plain")
    run_config = in_app({"query-batches": "per-query"}, tmp_path / "run")
    app = Client(Net, loss, lambda context: form(*own_points(context))).add_to(ClientApp())
    found = start({"query-batches": "per-query"}, tmp_path / "run", grid=Nodes(run_config, app=app),
                  held_out=form(*points(64, 0)))  # fmt: skip
    assert records_of(found.folder) == records_of(plain.folder)
    assert found.summary["eval_loss_end"] == plain.summary["eval_loss_end"]


# --- who comes late, lies or has another module ---


def test_a_client_that_comes_late_replays_what_it_missed(tmp_path: Path) -> None:
    run_config = in_app({"rounds": 6, "quorum": 1}, tmp_path / "run")
    grid = Nodes(run_config, 3)
    away = grid.keep([0, 1])
    grid.before = lambda _, plan: grid.bring(away) if plan.round == 4 else None
    found = start({"rounds": 6, "quorum": 1}, tmp_path / "run", grid=grid)
    assert_one_model(found.summary, [0, 1, 2])
    assert {row["client"] for row in read_table(found.folder / "clients.csv") if int(row["round"]) < 4} == {"0", "1"}


def test_a_client_that_lies_is_not_used(tmp_path: Path) -> None:
    values = {"rounds": 4, "quorum": 1}
    grid = Nodes(in_app(values, tmp_path / "run"), 3)

    def lie(index: int, message: Message, reply: Message) -> Message:
        if index == 1 and message.metadata.message_type == "train.zo":
            answer = messages.unpack(Answer, reply.content)
            steep = replace(answer, exponent=answer.exponent + 20)
            return Message(content=messages.pack(steep), reply_to=message)
        return reply

    grid.alter = lie
    found = start(values, tmp_path / "run", grid=grid)
    assert found.summary["client_digests"]["0"] == found.summary["digest"]
    fared = {row["client"]: row["result"] for row in read_table(found.folder / "clients.csv")}
    assert fared["1"] in ("implausible", "out_of_range") and fared["0"] == fared["2"] == "used"


def with_policy(path: Path) -> Callable[[Message, Context], Message]:
    """An app on nodes that have a policy in that file."""
    app = Client(Net, loss, own_points).add_to(ClientApp())

    def answer(message: Message, context: Context) -> Message:
        context.node_config["policy"] = str(path)
        return app(message, context)

    return answer


def test_a_nodes_policy_holds_for_an_app_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "policy.toml"
    own.write_text("smallest-batch = 9\n")
    answer = with_policy(own)
    grid = Nodes(in_app({}, tmp_path / "run"), others={0: answer, 1: answer})
    with pytest.raises(UserError, match="batch-size = 8, but this node's policy has smallest-batch = 9"):
        start({}, tmp_path / "run", grid=grid)
    strict = f'folders = ["{tmp_path}"]\nsmallest-batch = 8\nintegers-per-message = 4\nslopes-in-all = 100\n'
    own.write_text(f"{strict}templates = false\nsnapshots = false\n")
    grid = Nodes(in_app({}, tmp_path / "again"), others={0: answer, 1: answer})
    assert_one_model(start({}, tmp_path / "again", grid=grid).summary, [0, 1])


def test_nodes_that_take_no_snapshots_are_sent_records_where_snapshots_were_quicker(tmp_path: Path) -> None:
    own, out = tmp_path / "policy.toml", tmp_path / "run"
    own.write_text("snapshots = false\n")
    answer, values = with_policy(own), {**WAYS["zo local"], "rounds": 6, "link-megabits": 1e5}
    first = start(values, out, grid=Nodes(in_app(values, out), others={0: answer, 1: answer})).summary
    assert_one_model(first, [0, 1])
    # A server that lost rounds finds clients ahead of it, whom only weights or the whole history lead back.
    repair.cut(RunFolder(out), 2)
    again = start(values, out, grid=Nodes(in_app(values, out), others={0: answer, 1: answer})).summary
    assert_one_model(again, [0, 1])
    assert again["digest"] == first["digest"]


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, CLASSES + 1)


def test_another_module_on_a_node_is_named(tmp_path: Path) -> None:
    for model, word in (
        (Wider, "another model and trainable and weights"),
        (lambda: nn.Sequential(Net()), "another model and trainable and weights"),
    ):
        others = {1: Client(model, loss, own_points).add_to(ClientApp())}
        grid = Nodes(in_app({}, tmp_path / "run"), others=others)
        with pytest.raises(UserError, match=f"client 1: it has {word} than the server: give both the same"):
            start({}, tmp_path / "run", grid=grid)
    assert not (tmp_path / "run").exists()


# --- going on ---


@pytest.mark.parametrize("way", ["zo", "core", "fo"])
def test_a_server_that_starts_again_ends_as_if_it_had_not_stopped(tmp_path: Path, way: str) -> None:
    more = WAYS[way] | {"save-interval": 1}
    whole = start(more | {"rounds": 5}, tmp_path / "whole")
    start(more | {"rounds": 2}, tmp_path / "run")
    found = start(more | {"rounds": 5}, tmp_path / "run")
    assert found.summary["digest"] == whole.summary["digest"]
    assert records_of(found.folder) == records_of(whole.folder)
    assert found.train_metrics_clientapp == whole.train_metrics_clientapp  # the rounds before the stop too
    assert "flwr run . --run-config" in RunFolder(found.folder).go_on()


def test_a_run_does_not_go_on_with_other_data_or_another_module(tmp_path: Path) -> None:
    start({}, tmp_path / "run")
    with pytest.raises(UserError, match="began with another held_out"):
        start({"rounds": 6}, tmp_path / "run", held_out=points(64, 9))
    with pytest.raises(UserError, match="began with another model, trainable, weights"):
        start({"rounds": 6}, tmp_path / "run", model=Wider)
    with pytest.raises(UserError, match="began with another queries"):
        start({"rounds": 6, "queries": 5}, tmp_path / "run")


# --- metrics, histories, handlers ---


def test_results_tell_ones_own_metrics_of_server_and_clients(tmp_path: Path) -> None:
    values = {"client-held-out-fraction": 0.25}
    client = Client(Net, loss, own_points, metrics=accuracy)
    run_config = in_app(values, tmp_path / "run")
    found = start(values, tmp_path / "run", grid=Nodes(run_config, app=client.add_to(ClientApp())))
    assert sorted(found.train_metrics_clientapp) == [1, 2, 3, 4]
    assert sorted(found.evaluate_metrics_serverapp) == sorted(found.evaluate_metrics_clientapp) == [0, 2, 4]
    served, own = found.evaluate_metrics_serverapp[4], found.evaluate_metrics_clientapp[4]
    assert served["wrong"] == round(64 * (1 - served["accuracy"])) and served["loss"] == found.summary["eval_loss_end"]  # type: ignore[operator]
    assert found.summary["accuracy"] == served["accuracy"] and found.summary["metrics"]["wrong"] == served["wrong"]
    rows = [row for row in read_table(found.folder / "client_evaluations.csv") if row["round"] == "4"]
    given = [json.loads(row["metrics"]) for row in rows]
    assert [row["examples"] for row in rows] == ["10", "12"]
    assert own["accuracy"] == pytest.approx(
        sum(n * one["accuracy"] for n, one in zip((10, 12), given, strict=True)) / 22
    )
    assert found.train_metrics_clientapp[1].keys() == {"loss"}


def test_what_a_node_says_of_itself_is_made_fit_to_use() -> None:
    for raw in (
        "",
        "[1]",
        '{"a": "b"}',
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": true}',
        json.dumps({str(n): 1 for n in range(65)}),
    ):
        assert Evaluation(0, b"", 1.0, 1, raw).measures() == {}, raw
    assert sanitize.measures('{"a\\u001b": 2}') == {"a\\x1b": 2.0}


def test_handlers_of_ones_own_stand_beside_those_of_zofed(tmp_path: Path) -> None:
    client, app, met = Client(Net, loss, own_points), ClientApp(), list[str]()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(content=RecordDict(), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(content=RecordDict(), reply_to=message)

    @app.train("zo")
    def train_zo(message: Message, context: Context) -> Message:
        met.append(message.metadata.message_type)
        return client.answer(message, context)

    client.add_to(app, *(kind for kind in client.kinds if kind != "train.zo"))
    found = start({}, tmp_path / "run", grid=Nodes(in_app({}, tmp_path / "run"), app=app))
    assert_one_model(found.summary, [0, 1])
    assert len(met) == 2 * BASE["rounds"]


def test_both_apps_run_in_this_process(tmp_path: Path) -> None:
    app, found = ServerApp(), list[Result]()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        found.append(strategy().start(grid, context))

    client_app = Client(Net, loss, own_points).add_to(ClientApp())
    simulate(app, client_app, 3, in_app({}, tmp_path / "run"))
    assert_one_model(found[0].summary, [0, 1, 2])
    with pytest.raises(UserError, match="num_supernodes = 0"):
        simulate(app, client_app, 0, {})


def test_what_a_person_froze_stays_frozen(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Net()
        model.first.requires_grad_(False)
        return model

    app = Client(build, loss, own_points).add_to(ClientApp())
    found = start({}, tmp_path / "run", grid=Nodes(in_app({}, tmp_path / "run"), app=app), model=build)
    torch.manual_seed(0)
    began = build().state_dict()
    moved = [
        name for name, tensor in found.arrays.to_torch_state_dict().items() if not torch.equal(tensor, began[name])
    ]
    assert moved == ["last.weight", "last.bias"]


# --- mistakes ---


def refused(values: Mapping[str, Any], tmp_path: Path, **own: Any) -> str:
    """What a run is refused with. own: of both sides, but held_out of the server and data of the clients."""
    sides = {"model": Net, "loss": loss} | {key: value for key, value in own.items() if key in ("model", "loss")}
    run_config = in_app(values, tmp_path / "run")
    with pytest.raises(UserError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = Client(**sides, data=own.get("data", own_points)).add_to(ClientApp())
        start(
            values,
            tmp_path / "run",
            grid=Nodes(run_config, app=app),
            **sides | {k: own[k] for k in ("held_out",) if k in own},
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    return str(error.value)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Dropping(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(points(4, 0)[0])


def weighted(context: Context) -> Any:
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 40, 40)
    return DataLoader(TensorDataset(*points(40, 1)), sampler=sampler)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "made already": ({"model": Net()}, "model = a Net that is made already: give the class"),
    "no module": ({"model": lambda: 3}, "gives an int, not a torch.nn.Module"),
    "nothing trains": ({"model": Frozen}, "model = Frozen has no parameter that requires a gradient"),
    "no parameters": ({"model": nn.Identity}, "no parameter that requires a gradient"),
    "no function": ({"loss": 0.5}, "loss = 0.5 cannot be called"),
    "a number": ({"loss": lambda m, b: loss(m, b).item()}, "loss gives a float of .*: give the tensor itself"),
    "not one number": (
        {"loss": lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")},
        r"client 0: loss gives a tensor of shape \(8,\) of the first batch of client 0: give its mean",
    ),
    "whole numbers": ({"loss": lambda m, b: b[1].sum()}, "loss gives torch.int64"),
    "no finite number": ({"loss": lambda m, b: loss(m, b) * float("nan")}, "loss gives nan of the first batch"),
    "too large": ({"loss": lambda m, b: loss(m, b) * 1e8}, "it must be a number of at most 1,000,000"),
    "unused": ({"loss": lambda m, b: m.first(b[0]).square().mean()}, "last.weight"),
    "dropout": ({"model": Dropping}, "draws random numbers"),
    "batch norm": ({"model": Normed}, "norm"),
    "no data": ({"data": lambda _: None}, "the data of client 0 is a NoneType: give a tensor"),
    "empty data": ({"data": lambda _: points(0, 1)}, "the data of client 0 holds no example"),
    "unlike lengths": ({"data": lambda _: (points(3, 1)[0], points(4, 1)[1])}, "tensors of 3 and 4 examples"),
    "arrays": ({"data": lambda _: (points(3, 1)[0].numpy(),)}, "holds a[n]? ndarray"),
    "a stream": ({"data": lambda _: Stream()}, "is an IterableDataset, which cannot be asked for the same batch"),
    "a sampler": ({"data": weighted}, "is a DataLoader with a WeightedRandomSampler"),
    "nothing held out": ({"held_out": None}, "held_out = None"),
    "empty held out": ({"held_out": points(0, 0)}, "the server's held_out holds no example"),
}


@pytest.mark.parametrize(("own", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_a_run_begins(tmp_path: Path, own: dict[str, Any], words: str) -> None:

    for mode in ("zo", "fo"):
        told = refused({"mode": mode}, tmp_path, **own)
        assert re.search(words, told), told


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dataset": "sample-dclm"}, "zofed.dataset = 'sample-dclm' has no meaning .* the argument data says it"),
        ({"model": "tiny"}, "the argument model says it"),
        ({"task": "prompt"}, "the argument loss says it"),
        ({"objective": "accuracy"}, "the argument loss says it"),
        ({"partition": "dirichlet"}, "the argument data says it"),
        ({"querys": 3}, "unknown setting 'querys': did you mean 'queries'"),
        ({"queries": 0}, "queries = 0"),
        ({"scope": "nowhere"}, "scope = 'nowhere' leaves nothing to train"),
        ({"quorum": 3, "clients": 2}, "quorum = 3"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_named(tmp_path: Path, values: dict[str, Any], words: str) -> None:

    told = refused(values, tmp_path)
    assert re.search(words, told), told


def test_metrics_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    for given, words in ((3, "gives an int"), ({"a": "b"}, "gives 'a': str"), ({1: 2.0}, "gives 1: float")):
        with pytest.raises(UserError, match=words):
            start({}, tmp_path / "run", metrics=lambda *_, given=given: given)
    assert OwnModule(Net, loss)._measured({"nan": float("nan"), "one": torch.tensor(1.0)}) == {"one": 1.0}


def test_every_setting_is_said_by_code_or_acts() -> None:
    said = own_settings.said_by_code()
    assert said.keys() < zofed.config.SETTINGS.keys()  # type: ignore[attr-defined]
    assert {
        "queries",
        "scope",
        "batch-size",
        "forward-dtype",
        "rounds",
        "device",
    } <= zofed.config.SETTINGS.keys() - said.keys()  # type: ignore[attr-defined]


def test_commands_that_need_the_code_of_a_module_say_so(
    tmp_path: Path, zofed_command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = str(start({}, tmp_path / "run").folder)
    for words in ("eval", "generate --chat", "export --merged --out x", "journal replay"):
        status, _, told = zofed_command(*words.split(), folder)
        assert status == 2 and "a module of a person's own" in told and "zofed.replay" in told, (words, told)
    status, _, told = zofed_command("simulate", "--resume", folder)
    assert status == 2 and "continue it with flwr run . --run-config" in told
    assert zofed_command("watch", folder)[0] == zofed_command("runs", str(tmp_path))[0] == 0
