"""One class a mode: what a round asks, what a step costs, what a run needs to go on, what replays.

Central training, the server, forecasts, footprints and tables ask here; nothing else tells modes apart by their names.
A new mode is a class and a row of `MODES`, and, where it asks what no other does, a method of `steps.Steps` and of
`federated.rounds.Rounds`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from zofed.config import Settings
from zofed.core.estimators import forward_passes
from zofed.training import measurements

# What a round asks: slopes along seeded directions; coefficients of seeded directions, trained; a gradient, which is
# the step; a gradient, and slopes along directions that it shapes; an update of clients that train on their own.
Request = Literal["slopes", "coefficients", "gradient", "guided", "update"]


@dataclass(frozen=True, slots=True)
class Passes:
    """Bytes that the passes of one model hold, each found when it is first wanted.

    gradient: of all that trains, in its own type. own_steps: several of a client, by backpropagation.
    """

    gradient: int
    forward: Callable[[], int]
    backward: Callable[[], int]
    own_steps: Callable[[], int]
    subspace: Callable[[], int]


class Mode:
    """What the modes have in common: those of zeroth order, unless a class says otherwise."""

    # A journal holds only digests of gradients: a mode that has some goes on from checkpoints; the others are replayed
    # from the journal alone, as the end of a run proves.
    has_gradients: ClassVar[bool] = False
    # A gradient stands beside zeroth order, with data, a batch size and an optimizer of its own.
    helps_zeroth_order: ClassVar[bool] = False
    measures_slopes: ClassVar[bool] = True
    trains_coefficients: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def request(self, round_: int) -> Request:
        """What a round asks for."""
        return "slopes"

    @property
    def bp_interval(self) -> int:
        """Rounds from one gradient in a record to the next; 0: there is none."""
        return self.settings.bp_interval if self.helps_zeroth_order else 0

    @property
    def backpropagating_clients(self) -> Literal["none", "some", "all"]:
        """Whose node must be able to backpropagate in a federation."""
        return "some" if self.helps_zeroth_order and self.settings.gradient_source == "clients" else "none"

    @property
    def direction_kind(self) -> str:
        """The kind of the directions that its records move along."""
        return self.settings.directions

    @property
    def examples_of_a_step(self) -> int:
        """Training examples that a step reads on one client, as `epochs` counts them."""
        return measurements.examples_seen(self.settings)

    @property
    def cost(self) -> float:
        """Forward-equivalents of a step on one client, in the mean: examples run forward, a backward counting two."""
        settings = self.settings
        forward = measurements.passes(settings) * (measurements.examples_per_query(settings) or settings.batch_size)
        if not self.helps_zeroth_order:
            return forward
        backward = 3 * settings.gradient_accumulation * measurements.backprop_batch_size(settings)
        return forward + backward / settings.bp_interval

    def longer_than(self, trial: Settings) -> float:
        """How many times as long as a step of `trial` (fewer queries, one inner step) a step of the settings takes."""
        of_all, of_trial = (forward_passes(some.finite_difference, some.queries) for some in (self.settings, trial))
        return of_all / of_trial

    def step_bytes(self, passes: Passes) -> int:
        """The most that a step holds beside weights and optimizer state."""
        return passes.forward()

    @property
    def optimizer_states(self) -> int:
        """How many optimizers keep a state of the size of what trains."""
        return 1


class ZerothOrder(Mode):
    """Forward passes only."""


class FirstOrder(Mode):
    """Backpropagation."""

    has_gradients = True
    measures_slopes = False

    def request(self, round_: int) -> Request:
        """An update, in every round."""
        return "update"

    @property
    def bp_interval(self) -> int:
        """Every round."""
        return 1

    @property
    def backpropagating_clients(self) -> Literal["none", "some", "all"]:
        """All."""
        return "all"

    @property
    def examples_of_a_step(self) -> int:
        """Those of all its batches."""
        return self.settings.gradient_accumulation * self.settings.batch_size

    @property
    def cost(self) -> float:
        """A forward and a backward pass of each example."""
        return 3 * self.examples_of_a_step

    def longer_than(self, trial: Settings) -> float:
        """By a client's own steps: a trial takes one."""
        return float(self.settings.local_steps if self.settings.clients else 1)

    def step_bytes(self, passes: Passes) -> int:
        """Those of backpropagation, or of a client's own steps by it."""
        takes_own = self.settings.clients and self.settings.local_steps > 1
        return passes.own_steps() if takes_own else passes.backward()


class Instruct(Mode):
    """A gradient now and then, and slopes along directions that it shapes; zeroth order in between."""

    has_gradients = True
    helps_zeroth_order = True

    def request(self, round_: int) -> Request:
        """The first round of each interval begins with a gradient."""
        return "guided" if (round_ - 1) % self.settings.bp_interval == 0 else "slopes"

    def step_bytes(self, passes: Passes) -> int:
        """Slopes along a guide take a saved copy of what trains, and the gradient as guide."""
        return max(passes.backward(), passes.forward() + 2 * passes.gradient)

    @property
    def optimizer_states(self) -> int:
        """Two, where both kinds of step occur."""
        return 2 if self.settings.bp_interval > 1 else 1


class Calibrate(Mode):
    """Zeroth order with a step of backpropagation now and then."""

    has_gradients = True
    helps_zeroth_order = True

    def request(self, round_: int) -> Request:
        """The last round of each interval is a gradient."""
        return "gradient" if round_ % self.settings.bp_interval == 0 else "slopes"

    def step_bytes(self, passes: Passes) -> int:
        """The larger of the two kinds of step."""
        return max(passes.backward(), passes.forward())

    @property
    def optimizer_states(self) -> int:
        """One for either kind of step."""
        return 2


class Subspace(Mode):
    """Backpropagation to the coefficients of seeded directions, which are all that is sent."""

    measures_slopes = False
    trains_coefficients = True

    def request(self, round_: int) -> Request:
        """Coefficients, in every round."""
        return "coefficients"

    @property
    def direction_kind(self) -> str:
        """`core`: pairs of left and right factors."""
        return "core" if self.settings.subspace_variant == "core" else self.settings.directions

    @property
    def examples_of_a_step(self) -> int:
        """Those of all its inner steps."""
        return self.settings.subspace_interval * self.settings.batch_size

    @property
    def cost(self) -> float:
        """A forward and a backward pass of each example."""
        return 3 * self.examples_of_a_step

    def longer_than(self, trial: Settings) -> float:
        """By its inner steps."""
        return self.settings.subspace_interval / trial.subspace_interval

    def step_bytes(self, passes: Passes) -> int:
        """Those of backpropagation to the coefficients: no gradient of weights."""
        return passes.subspace()

    @property
    def optimizer_states(self) -> int:
        """None: what the coefficients keep is small."""
        return 0


MODES: dict[str, type[Mode]] = {
    "zo": ZerothOrder,
    "fo": FirstOrder,
    "instruct": Instruct,
    "calibrate": Calibrate,
    "subspace": Subspace,
}


def mode_of(settings: Settings) -> Mode:
    """The mode of some settings."""
    return MODES[settings.mode](settings)
