"""Forward pre-hooks that edit or record the inputs of modules, and are always removed again.

One kind of hook serves every method: a head is a slice of the input of `o_proj`, and a neuron is one feature
of the input of `down_proj`. Recording, replacing, masking, scaling and learning all act on that input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from hones_eval.errors import EditError

Edit = Callable[[Tensor], Tensor]
"""A function of a module's input. It does not change the input in place, and keeps its shape and dtype."""


class Site(NamedTuple):
    """A module whose input is edited or recorded.

    `name` is used in messages; `width` is the size of the input's last dimension.
    """

    name: str
    module: nn.Module
    width: int


class AttachedEdits:
    """Edits that stay attached to the inputs of modules until `detach`."""

    def __init__(self, edits: Sequence[tuple[Site, Edit]]) -> None:
        """Attach every edit. `runs` counts how often each edit ran, per site name."""
        self.runs = {site.name: 0 for site, _ in edits}
        self._handles = [
            site.module.register_forward_pre_hook(self._hook(site, edit)) for site, edit in edits
        ]

    def check_ran(self) -> None:
        """Raise EditError when an edit has not run since the last check, then reset the counts."""
        idle = [name for name, count in self.runs.items() if count == 0]
        self.runs = dict.fromkeys(self.runs, 0)
        if idle:
            raise EditError(
                f"{len(idle)} of {len(self.runs)} edits never ran, the first at {idle[0]}: the forward pass "
                "did not call that module, so its results are those of an unedited model"
            )

    def detach(self) -> None:
        """Remove every edit. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, site: Site, edit: Edit) -> Callable[..., Any]:
        # This runs at every generated token, so it does as little as possible: hooks without keyword
        # arguments are the cheaper kind, and `input_of`, which builds the error messages, is called only on
        # bad input.
        def edit_input(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
            x = args[0] if len(args) == 1 else None
            if not isinstance(x, Tensor) or x.shape[-1] != site.width:
                x = input_of(site, args)
            edited = edit(x)
            if edited.shape != x.shape or edited.dtype != x.dtype:
                raise EditError(
                    f"the edit at {site.name} turned {tuple(x.shape)} {x.dtype} into "
                    f"{tuple(edited.shape)} {edited.dtype}; an edit must keep shape and dtype"
                )
            self.runs[site.name] += 1
            return edited

        return edit_input


@contextmanager
def editing(edits: Sequence[tuple[Site, Edit]]) -> Iterator[AttachedEdits]:
    """Attach edits for the length of a `with` block.

    Raises: EditError at the end of the block when an edit never ran.
    """
    attached = AttachedEdits(edits)
    try:
        yield attached
        attached.check_ran()
    finally:
        attached.detach()


@contextmanager
def recording(sites: Sequence[Site], positions: slice | None = None) -> Iterator[dict[str, Tensor]]:
    """Record the most recent input of every site during a `with` block.

    Args:
        sites: the modules to record.
        positions: token positions to keep; None keeps all of them.

    Yields: tensors [batch, tokens, width] by site name, filled as the sites are called.
    Raises: EditError at the end of the block when a site was never called.
    """
    recorded: dict[str, Tensor] = {}

    def record(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = input_of(site, args)
            recorded[site.name] = x.detach() if positions is None else x.detach()[:, positions]

        return hook

    handles = [site.module.register_forward_pre_hook(record(site)) for site in sites]
    try:
        yield recorded
        missing = [site.name for site in sites if site.name not in recorded]
        if missing:
            raise EditError(f"nothing was recorded at {missing[0]}: no forward pass called it")
    finally:
        for handle in handles:
            handle.remove()


def input_of(site: Site, args: tuple[Any, ...]) -> Tensor:
    """Return the input tensor of a call of a site's module.

    Raises: EditError when the module was not called with exactly one positional tensor of the site's width.
    """
    if len(args) != 1 or not isinstance(args[0], Tensor):
        raise EditError(f"{site.name} was called with {len(args)} positional arguments; expected one tensor")
    x = args[0]
    if x.shape[-1] != site.width:
        raise EditError(
            f"{site.name} received an input of shape {tuple(x.shape)}; its last size should be {site.width}"
        )
    return x


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` by another function for the length of a `with` block."""
    attributes = vars(module)
    own = attributes.get("forward")  # accelerate stores a wrapped forward on the instance
    attributes["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own
