"""One example: a question as the model receives it, with its gold answer."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Example:
    """A recorded question and its gold answer."""

    index: int
    """Position in the set, from 0."""
    task: str
    split: str
    doc_id: int
    """Position in the task's split; the key of lmms-eval's sample logs."""
    inputs: dict[str, Any]
    """The arguments of the model's `forward`, a batch of one."""
    settings: dict[str, Any]
    """The other arguments of `generate`."""
    target: str
    """The gold answer; for captions up to five references joined."""
    references: list[str]
    """The answers that count as correct, best first."""
    target_ids: list[int]
    """The target encoded alone, without special tokens, at most 128."""
    image_hashes: list[str]
    text_hash: str
    details: Any = None
    """What the task's kind of answer recorded for itself, for example the choices of a question."""
    is_distractor: bool = False
    """Whether the example is a candidate that is not the right answer of its query."""

    @property
    def content(self) -> list[str]:
        """What tells examples with other content: the hashes of the images, or of the text without any."""
        return self.image_hashes or [self.text_hash]

    @property
    def where(self) -> str:
        """The example's task and document, as error messages name them."""
        return f"{self.task}, doc_id {self.doc_id}"
