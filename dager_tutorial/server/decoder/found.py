"""The texts of a tree of prefixes, and what confirms each.

Chapter `06_decoder_recovery`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dager_tutorial.models.tap import Tap
from dager_tutorial.server.constants import constants
from dager_tutorial.server.decoder.ends import Texts
from dager_tutorial.server.decoder.tree import Tree
from dager_tutorial.server.outcome import Ends, FoundText, Outcome
from dager_tutorial.server.subspace import Span
from dager_tutorial.status import Certainty, Confirmation, Status

Spans = dict[Tap, Span]


@dataclass(frozen=True)
class Found:
    """The texts of a tree and what their places in it say."""

    tree: Tree
    texts: Texts
    tested: Spans
    last: Spans

    @property
    def ends(self) -> Ends:
        """What the last block says of the places where texts end."""
        clear = [span.rank for span in self.last.values() if span.clear]
        rank = None if self.texts.crowded else max(clear, default=None)
        return Ends(self.texts.seen, len(self.texts.confirmed), len(self.texts.nodes), rank)

    def outcome(self, status: Status, diagnosis: str) -> Outcome:
        """The texts with what confirms each, under a verdict."""
        found = (FoundText(self.tree.nodes[i].tokens, self.tree.nodes[i].ratio, self._by(i)) for i in self.texts.nodes)
        return Outcome(status, diagnosis, tuple(found))

    def _by(self, node: int) -> Confirmation:
        """What confirms a text: residuals its rows, the last block its end; leverages alone confirm nothing.

        Under strong noise a false end can pass in the last block, too: it confirms only where its own signal is clear
        and no more prefixes pass than it allows.
        """
        if node in self.texts.confirmed and self.ends.rank is not None:
            return Confirmation(Certainty.WHOLE, (*self.tested, *self.last))
        return Confirmation(Certainty.ROWS, tuple(self.tested)) if self.tested else Confirmation(Certainty.GUESS)


def likeliest(found: Found) -> Found:
    """Of a search by leverage: what the last block confirms, then the likeliest others, as many as there are texts."""
    confirmed = [node for node in found.texts.nodes if node in found.texts.confirmed]
    rest = [node for node in found.texts.nodes if node not in found.texts.confirmed]
    rest.sort(key=lambda node: found.tree.nodes[node].ratio)
    room = max((span.rank for span in found.last.values()), default=constants().widest) - len(confirmed)
    kept = (*confirmed, *rest[: max(0, room)])
    return Found(found.tree, replace(found.texts, nodes=kept), found.tested, found.last)
