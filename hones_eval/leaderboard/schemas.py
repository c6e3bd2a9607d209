"""Schemas of the files that a board reads: results and run manifests, typed and bounded.

Logs come from anyone. Fields that the board uses have types and limits here (`hones_eval.limits`); all other
fields are ignored.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hones_eval import limits
from hones_eval.errors import HonesError


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds an unpaired surrogate, which is not text") from None
    return value


def _shallow(value: Any) -> Any:
    check_depth(value)
    return value


def _number_or_none(value: object) -> float | None:
    """A finite number; None for anything else, as lmms-eval reports N/A for some metrics."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        raise ValueError("it is too large") from None


Name = Annotated[str, Field(max_length=limits.NAME), AfterValidator(_text)]
Loose = Annotated[Any, AfterValidator(_shallow)]
Count = Annotated[int, Field(strict=True, ge=0, le=limits.EXAMPLES)]
Integer = Annotated[int, Field(strict=True, ge=0, le=limits.INTEGER)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Reported = Annotated[float | None, BeforeValidator(_number_or_none)]
Schema = TypeVar("Schema", bound="_Lenient")


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class RunOptions(_Lenient):
    """`config` of a results file: the options of the run."""

    model: Name = ""
    model_args: Annotated[
        dict[Name, Loose] | Annotated[str, Field(max_length=1 << 20), AfterValidator(_text)] | None, Field()
    ] = None
    limit: Finite | None = None
    offset: Integer | None = None
    gen_kwargs: Loose = None
    random_seed: Loose = None
    numpy_seed: Loose = None
    torch_seed: Loose = None
    fewshot_seed: Loose = None
    resolved_cli_args: dict[str, Loose] | None = None


class SampleCounts(_Lenient):
    """`n-samples` of one task."""

    original: Loose = None


class Usage(_Lenient):
    """`usage` of a results file."""

    budget_exceeded: bool | None = None


class ResultsFile(_Lenient):
    """A results file of lmms-eval."""

    results: dict[Name, Annotated[dict[Name, Reported], Field(max_length=limits.METRICS)] | None]
    configs: Annotated[dict[Name, dict[str, Loose]], Field(max_length=limits.TASKS)]
    config: RunOptions
    higher_is_better: dict[str, dict[str, bool | None] | None] | None = None
    n_samples: dict[str, SampleCounts | None] | None = Field(default=None, alias="n-samples")
    usage: Usage | None = None
    date: Loose = None


class ExampleSetRecord(_Lenient):
    """A set of examples in a manifest's copy of a steering's provenance."""

    task: Name | None = None
    split: Name | None = None
    count: Count = 0
    offset: Integer = 0
    doc_ids: Annotated[list[Integer], Field(max_length=limits.EXAMPLES)] = []
    image_hashes: Annotated[list[Name], Field(max_length=limits.EXAMPLES)] = []
    text_hashes: Annotated[list[Name], Field(max_length=limits.EXAMPLES)] = []


class ProvenanceRecord(_Lenient):
    """The provenance of a steering, as copied into a manifest."""

    base_model: Name | None = None
    weights: Name | None = None
    method: Name | None = None
    settings: Annotated[dict[str, Any], AfterValidator(_shallow)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-limits.INTEGER, le=limits.INTEGER)] | None = None
    ranking: Annotated[dict[str, Any], AfterValidator(_shallow)] | None = None
    examples: Annotated[list[ExampleSetRecord], Field(max_length=limits.EXAMPLE_SETS)] = []


class SteeringRecord(_Lenient):
    """`steering` of a manifest."""

    path: Name
    digest: Name
    strength: Finite
    attach: Name
    scope: Name = "all"
    condition: Name = "none"
    acted: dict[Name, list[Annotated[list[Integer], Field(min_length=2, max_length=2)]]] = Field(
        default_factory=dict
    )
    provenance: Annotated[ProvenanceRecord, BeforeValidator(lambda value: value or {})] = ProvenanceRecord()


class BaseModelRecord(_Lenient):
    """`base_model` of a manifest."""

    id: Name
    revision: Name | None = None
    weights: Name | None = None


class ErrorRecord(_Lenient):
    """One of the `errors` of a manifest."""

    task: Name | None = None
    doc_id: Annotated[int, Field(strict=True)] | Name | None = None
    error: Annotated[Any, AfterValidator(lambda value: str(value)[: limits.NAME])] = None


class UntilRecord(_Lenient):
    """One of `until` of a manifest: strings that end answers, and whether the wrapper ends answers there."""

    strings: Annotated[list[Name], Field(max_length=limits.METRICS)] = []
    obeyed: bool | None = None


class ManifestFile(_Lenient):
    """A run manifest, without its `requests`, which are read on their own for speed."""

    base_model: BaseModelRecord
    wrapper: Name
    base_wrapper: Name
    steering: SteeringRecord | None
    errors: Annotated[list[ErrorRecord], Field(max_length=limits.ERRORS)]
    created: Name
    until: Annotated[dict[Name, UntilRecord], Field(max_length=limits.TASKS)] = {}
    rank: Annotated[int, Field(strict=True, ge=0, le=1 << 20)] = 0
    results: Name | None = None
    package_version: Name | None = None
    lmms_eval_version: Name | None = None
    torch_version: Name | None = None
    transformers_version: Name | None = None


def parsed(schema: type[Schema], content: object, describe: Callable[[str], str]) -> Schema:
    """Content checked against a schema. Raises: HonesError with `describe` of the first problem."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise HonesError(describe(f"{place}: {first['msg']}" if place else first["msg"])) from None
    except RecursionError:
        raise HonesError(describe("it is nested too deeply")) from None


def check_depth(content: object) -> None:
    """Check that content is nested at most `limits.JSON_DEPTH` levels deep. Raises: ValueError."""
    level: list[Any] = [content]
    for _ in range(limits.JSON_DEPTH + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
        level = [v for outer in level for v in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(f"it is nested more than {limits.JSON_DEPTH} levels deep")
