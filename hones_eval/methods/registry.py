"""The methods of `rank`, by name: what each one scores, what it needs, and its line of help.

This module imports nothing heavy, so that `--help` can list the methods. To add a method, write
`hones_eval/methods/<method>.py` with a function `rank(job: Discovery) -> Ranking`, add its row here, and
compare it with a plain loop in a test. Everything else, such as the choices and the help of `--method`,
follows from the row.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hones_eval.errors import HonesError


class Method(NamedTuple):
    """One row of the registry.

    `function` is `module:name`. `help` is a phrase for `--method`. `scores` lists what the ranking holds.
    `exact_heads` and `exact_neurons`: whether its scores already are effects of replacing each site, which
    `--confirm` would only repeat. `head_edit`: whether it replaces heads, so that `--edit` applies.
    `gradients`: whether it needs a backward pass. `savings`: whether `--race` and `--screen` apply.
    `contrasts_tasks`: whether it compares the first task with others.
    """

    function: str
    help: str
    scores: tuple[Literal["heads", "neurons"], ...]
    exact_heads: bool = False
    exact_neurons: bool = False
    head_edit: bool = False
    gradients: bool = False
    savings: bool = False
    contrasts_tasks: bool = False


_BOTH: tuple[Literal["heads", "neurons"], ...] = ("heads", "neurons")
_BASELINES = "hones_eval.methods.baselines"

METHODS: dict[str, Method] = {
    "hones": Method(
        "hones_eval.methods.hones:rank",
        "heads by the drop of the task's metric when each is replaced, and neurons conditioned on the best",
        _BOTH,
        exact_heads=True,
        head_edit=True,
        savings=True,
    ),
    "vseam": Method(
        "hones_eval.methods.vseam:rank",
        "heads by the change of the answer's probability when each is replaced",
        ("heads",),
        exact_heads=True,
        head_edit=True,
    ),
    "atp": Method(
        "hones_eval.methods.atp:rank",
        "attribution patching: heads and neurons by a first-order estimate of the effect of removing each, "
        "from one forward and one backward pass per example",
        _BOTH,
        head_edit=True,
        gradients=True,
    ),
    "dvp": Method(f"{_BASELINES}:rank_dvp", "neurons by what they write towards the answer", ("neurons",)),
    "write_norm": Method(
        f"{_BASELINES}:rank_write_norm",
        "neurons by mean absolute activation times the norm of the write vector",
        ("neurons",),
    ),
    "activation": Method(
        f"{_BASELINES}:rank_activation", "neurons by mean absolute activation", ("neurons",)
    ),
    "entropy": Method(
        f"{_BASELINES}:rank_entropy",
        "neurons active in the first task and not in the others",
        ("neurons",),
        contrasts_tasks=True,
    ),
    "random": Method(f"{_BASELINES}:rank_random", "random scores", _BOTH),
}

if TYPE_CHECKING:
    MethodName = str
else:  # the choices of --method
    MethodName = Literal[tuple(METHODS)]


def method(name: str) -> Method:
    """Look up a method. Raises: HonesError that lists the methods, for an unknown name."""
    if name not in METHODS:
        raise HonesError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def function_of(name: str) -> Any:
    """Import the function of a method, which takes a `Discovery` and returns a `Ranking`."""
    module, _, function = method(name).function.partition(":")
    return getattr(import_module(module), function)


def described() -> str:
    """All methods with their help, as `--help` shows them."""
    return "; ".join(f"{name} ({row.help})" for name, row in METHODS.items())
