"""Weights change only by applying a record: in-place writes stand in a few known functions, each with its reason."""

import ast
from pathlib import Path

from zofed.base.files import PACKAGE

# Parameters have these names in the packages that touch them; a view of one that is written to is called `now`.
WEIGHTS = {"parameter", "now", "weight"}
IN_PLACE = {"copy_", "sub_", "add_", "mul_", "div_", "zero_", "fill_", "addcmul_", "lerp_", "set_"}
RESTORED = "weights_restored"  # the context whose end brings every bit back

# Where weights are written outside that context, and why they may be.
KNOWN = {
    ("core/optimizers.py", "step"): "the step of a record",
    ("core/replica.py", "_apply_entries"): "records, applied",
    ("core/replica.py", "load"): "a checkpoint: what applying the entries before it gave",
    ("core/estimators.py", RESTORED): "the context itself",
    ("core/estimators.py", "_shift"): "of `materialised_losses`, inside the context",
    ("core/soundness.py", "_write"): "for the first look at a loss, which restores what it shifted",
    ("models/lora.py", "set_in"): "a model that is being made",
    ("models/classifier.py", "load_head"): "a model that is being made",
    ("models/initial.py", "draw"): "a model that is being made",
    ("hf/run_files.py", "load_base"): "a model that is put back to where its journal starts",
    ("training/guided.py", "_write"): "of `_side`, inside the context",
    ("training/measurements.py", "_move"): "of `slopes`, inside the context",
}


def written(tree: ast.AST) -> list[ast.Call]:
    """Calls that write into a parameter."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        target = node.func.value if node.func.attr in IN_PLACE else None
        target = target or next((keyword.value for keyword in node.keywords if keyword.arg == "out"), None)
        while isinstance(target, ast.Subscript | ast.Attribute | ast.Call):
            target = target.func if isinstance(target, ast.Call) else target.value
        if isinstance(target, ast.Name) and target.id in WEIGHTS:
            found.append(node)
    return found


def restored(tree: ast.AST) -> set[int]:
    """ids of the nodes that stand inside the context."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(RESTORED in ast.unparse(item.context_expr) for item in node.items):
            inside |= {id(each) for each in ast.walk(node)}
    return inside


def places(path: Path) -> set[str]:
    """Functions that write into a parameter outside the context."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = restored(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = set()
    for call in written(tree):
        if id(call) not in inside:
            around = [function for function in functions if call in ast.walk(function)]
            found.add(max(around, key=lambda function: function.lineno).name if around else "<module>")
    return found


def test_weights_are_written_where_it_is_known_alone() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for package in ("core", "models", "training", "federated", "preflight", "experiments", "hf")
        for path in (PACKAGE / package).glob("*.py")
        for name in places(path)
    }
    assert found == set(KNOWN)
