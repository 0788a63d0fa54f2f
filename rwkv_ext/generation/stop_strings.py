"""StopStrings: where a text that arrives in pieces ends."""


class StopStrings:
    """Pass text on, in pieces, up to the first stop string, which may be spread over pieces.

    The stop string that is complete first ends the text (of several complete at once, the longest), so the result does
    not depend on where pieces begin and end. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stop: tuple[str, ...]):
        self.found: str | None = None
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""

    def push(self, piece: str) -> str:
        """Return the text that is now known to belong to the output."""
        text = self._held + piece
        ends = [(at + len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, self.found = min(ends, key=lambda item: item[0])
            self._held = ""
            return text[: end - len(self.found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
