"""Guesses of how an answer goes on, which one pass can check for several tokens at once.

Decoding one token per pass costs a pass per token, however few rows are left. Answers to the questions of one
task resemble each other, and an answer that an edit changes often goes on like the unedited one. So the next
tokens are guessed from answers that are known already, the guess is passed to the model together with the
last token, and its logits show how many of the guessed tokens greedy decoding would have chosen. Those are
kept; everything from the first wrong token on is dropped. A wrong guess therefore costs time, but never
changes an answer.
"""

from collections.abc import Sequence

LONGEST = 8
"""The number of tokens that are guessed at once, at most."""
CONTEXT = 3
"""The number of last tokens by which a known answer is found, at most."""
ANSWERS = 512
"""The number of known answers that are kept."""
TRIED, WORTH = 64, 0.25
"""After so many guesses, the number of right tokens per guess below which guessing stops."""


class Drafts:
    """Known answers, and guesses from them."""

    def __init__(self) -> None:
        """Know no answer."""
        self._places: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
        self._answers: set[tuple[int, ...]] = set()
        self.guesses = self.right = 0

    def learn(self, answer: Sequence[int]) -> None:
        """Add an answer; what came last is guessed first."""
        known = tuple(answer)
        if known in self._answers:
            return
        if len(self._answers) == ANSWERS:
            self._answers.clear()
            self._places.clear()
        self._answers.add(known)
        for end in range(1, len(known)):
            for size in range(1, min(CONTEXT, end) + 1):
                self._places[known[end - size : end]] = (known, end)

    def after(self, tokens: Sequence[int], like: Sequence[int] = ()) -> list[int]:
        """The tokens that may follow the beginning `tokens` of an answer; empty without a guess.

        `like` is an answer that this one may resemble position by position.
        """
        if self.guesses >= TRIED and self.right < WORTH * self.guesses:
            return []
        rest = list(like[len(tokens) :][:LONGEST])
        if rest and sum(own != other for own, other in zip(tokens, like, strict=False)) <= 1:
            return rest
        for size in range(min(CONTEXT, len(tokens)), 0, -1):
            if (found := self._places.get(tuple(tokens[-size:]))) is not None:
                known, place = found
                return list(known[place : place + LONGEST])
        return rest

    def checked(self, guesses: int, right: int) -> None:
        """Count guesses that a pass has checked, and the tokens of them that were right."""
        self.guesses += guesses
        self.right += right
