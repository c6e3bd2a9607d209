"""The anatomy of a model from its configuration alone, before anything is downloaded or loaded."""

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hones_eval.core.files import check_folder
from hones_eval.errors import HonesError, UnsupportedModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hones_eval.core.anatomy import Anatomy

GIB = 2**30


@dataclass(frozen=True)
class AnatomyReport:
    """What `hones_eval.anatomy` finds.

    `heads`, `head_widths`, `neurons`, `experts` and `expert_widths` have one number per layer. `weight_bytes`
    is the size of the weights in `dtype`; `recorded_bytes` is what one recorded pass keeps per prompt token.
    `unsupported` says why the model cannot be ranked; None where it can.
    """

    model: str
    layers: int
    heads: list[int]
    head_widths: list[int]
    neurons: list[int]
    experts: list[int]
    expert_widths: list[int]
    hidden: int
    vocabulary: int
    parameters: int
    dtype: str
    weight_bytes: int
    recorded_bytes: int
    image_token: int | None
    unsupported: str | None = None

    def lines(self) -> list[str]:
        """The report as text, one line per finding."""
        weights = _size(self.weight_bytes)
        count = self.parameters
        parameters = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
        size = f"{parameters} parameters, {weights} in {self.dtype}"
        if self.unsupported is not None:
            return [f"{self.model}: {size}", f"not supported: {self.unsupported}"]
        kept = _size(self.recorded_bytes * 1000)
        image = "none: tracing and tasks with images are not available"
        return [
            f"{self.model}: {size}",
            f"layers: {self.layers}, hidden size {self.hidden}, vocabulary {self.vocabulary}",
            f"heads: {_runs(self.heads)}, of width {_runs(self.head_widths)}",
            f"neurons: {_runs(self.neurons)}",
            *(
                [f"experts: {_runs(self.experts)}, of {_runs(self.expert_widths)} neurons"]
                if any(self.experts)
                else []
            ),
            *([f"without heads: layers {_numbers(self.heads)}"] if 0 in self.heads else []),
            *([f"without neurons: layers {_numbers(self.neurons)}"] if 0 in self.neurons else []),
            f"image token: {image if self.image_token is None else self.image_token}",
            f"memory for rank: {weights} of weights and {kept} per 1,000 prompt tokens",
            "replay: compared with hooked passes on the first example; full passes where it is not exact",
        ]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)

    def __repr__(self) -> str:
        """The lines of the report."""
        return "\n".join(self.lines())


def anatomy(pretrained: str, *, dtype: str | None = None, trust_remote_code: bool = False) -> AnatomyReport:
    """Find the heads, neurons and sizes of a model from its configuration, without its weights.

    The model is built on the meta device, which takes seconds and no memory for weights, also for models of
    hundreds of billions of parameters. The experiments that prove an anatomy need weights: they run when the
    model is loaded.

    Args:
        pretrained: a folder or a Hugging Face hub id with a `config.json`.
        dtype: type of the weights for the memory figures; by default that of the configuration.
        trust_remote_code: whether to run code from the repository, as in transformers.

    Raises: HonesError when there is no configuration, or no model class for it.

    Example:
        hones_eval.anatomy("Qwen/Qwen2.5-VL-72B-Instruct").heads[0]  # 64
    """
    check_folder("pretrained", pretrained)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise HonesError(f"no configuration at {pretrained!r}: {first_line(error)}") from None
    return report(config, pretrained, dtype)


def report(config: "PreTrainedConfig", name: str, dtype: str | None = None) -> AnatomyReport:
    """As `anatomy`, for a configuration."""
    import torch

    from hones_eval.core.anatomy import Anatomy

    model = empty_model(config, name)
    kind = dtype or str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    item = getattr(torch, kind, None)
    if not isinstance(item, torch.dtype):
        raise HonesError(f"{kind!r} is not a type of weights: give float32, bfloat16 or float16")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {"parameters": parameters, "dtype": kind, "weight_bytes": parameters * item.itemsize}
    title = f"{name} ({type(model).__name__})"
    try:
        found = Anatomy.of(model)
    except UnsupportedModelError as error:
        nothing: dict[str, Any] = {
            key: [] for key in ("heads", "head_widths", "neurons", "experts", "expert_widths")
        }
        return AnatomyReport(
            title,
            0,
            **nothing,
            hidden=0,
            vocabulary=0,
            recorded_bytes=0,
            image_token=None,
            unsupported=str(error),
            **sizes,  # type: ignore[arg-type]
        )
    return _report(title, found, config, sizes, item.itemsize)


def _report(
    title: str, found: "Anatomy", config: "PreTrainedConfig", sizes: dict[str, Any], itemsize: int
) -> AnatomyReport:
    shape = found.shape
    layers = range(shape.layers)
    heads, widths = [shape.heads_of(i) for i in layers], [shape.head_width_of(i) for i in layers]
    neurons = [shape.neurons_of(i) for i in layers]
    # Per token a recorded layer keeps its input, its output, its attention's output, its heads and, where the
    # FFN is dense, its neurons.
    plain = [n if found.has_plain_ffn(i) else 0 for i, n in enumerate(neurons)]
    kept = sum(3 * shape.hidden + h * w + n for h, w, n in zip(heads, widths, plain, strict=True))
    ids = [getattr(config, key, None) for key in ("image_token_id", "image_token_index")]
    return AnatomyReport(
        title,
        shape.layers,
        heads,
        widths,
        neurons,
        [sum(count for count, _ in shape.expert_groups(i)) for i in layers],
        [max((width for _, width in shape.expert_groups(i)), default=0) for i in layers],
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        recorded_bytes=kept * itemsize,
        image_token=next((i for i in ids if i is not None), None),
        **sizes,
    )


def empty_model(config: "PreTrainedConfig", name: str) -> "PreTrainedModel":
    """Make the model of a configuration on the meta device, without values.

    Raises: HonesError when there is no model class for it.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from hones_eval.core.anatomy import unembedding_of

    stated = [getattr(transformers, kind, None) for kind in getattr(config, "architectures", None) or []]
    makers = [kind for kind in stated if kind is not None and hasattr(kind, "_from_config")]
    makers += [AutoModelForImageTextToText, AutoModelForCausalLM]
    reasons = []
    for maker in makers:
        make = getattr(maker, "from_config", None) or maker._from_config
        try:
            with torch.device("meta"):
                model: PreTrainedModel = make(config)
        except (ValueError, AttributeError, KeyError, TypeError, RuntimeError, ImportError) as error:
            reasons.append(first_line(error))
            continue
        if unembedding_of(model) is not None:
            return model
        reasons.append(f"{type(model).__name__} gives no tokens")
    raise HonesError(f"no model can be made from the configuration of {name}: {reasons[0]}")


def _size(count: int) -> str:
    """Bytes in GiB, or in MiB where there are few."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _runs(numbers: list[int]) -> str:
    """Numbers per layer in short: `32`, or `4 (layers 0-2), 8 (layer 3)`."""
    if len(set(numbers)) == 1:
        return f"{numbers[0]} per layer"
    values = sorted(set(numbers), reverse=True)
    return ", ".join(f"{value} (layers {_numbers(numbers, value)})" for value in values)


def _numbers(numbers: list[int], value: int = 0) -> str:
    """The layers with a value, neighbours together: `0-2, 5`."""
    places = [place for place, number in enumerate(numbers) if number == value]
    groups = [
        [p for _, p in run] for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in groups)
