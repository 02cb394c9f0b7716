"""A few directions that some rows must explain together (chapter `11_limits`).

A trained adapter of rank r sends r combinations of the vectors that enter a map. Where there are more vectors than r,
none of them lies in that span. But the span lies in theirs: every true row explains a part of it, about r / n of its
own length where a false one explains r / width, and when the last of the n rows is known nothing is left.

The keys of a fresh adapter are such rows, too: what B sends of a head's queries is a combination of that head's keys,
`dL/dq_i = sum_j c_ij k_j`, in as many ways as the adapter has ranks.

Rows of a network share most of their directions whatever the text says. All is therefore seen in coordinates in which
rows of random texts are alike in all directions; whether a span lies in another does not depend on that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dager_tutorial.models.tap import precise
from dager_tutorial.server.constants import constants
from dager_tutorial.server.rank import rounding_floor


@dataclass(frozen=True)
class Wanted:
    """What is to be explained at a tap.

    Attributes:
        directions: float32, orthonormal rows, in whitened coordinates.
        whitening: float32: what vectors are multiplied by first, to whiten them or what a map makes of them.
    """

    directions: Float[Tensor, "wanted seen"]
    whitening: Float[Tensor, "inputs seen"]

    @classmethod
    def of(
        cls,
        gradient: Float[Tensor, "outputs seen"],
        usual: Float[Tensor, "sample inputs"],
        precision: float,
        through: Float[Tensor, "inputs seen"] | None = None,
    ) -> Wanted:
        """Read the directions off a gradient.

        Args:
            gradient: float64, each row a combination of the tap's input vectors, or of what a map makes of them.
            usual: Vectors of random texts at the tap.
            precision: Machine epsilon of the type in which the gradient was stored.
            through: The map; None for the vectors themselves.
        """
        usual = precise(usual) if through is None else precise(usual) @ precise(through)
        whitening = _whitening(usual)
        seen = _clear(gradient, precision) @ whitening
        whitening = whitening if through is None else precise(through) @ whitening
        return cls(torch.linalg.qr(seen.T).Q.T.float(), whitening.float())

    def white(self, vectors: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows seen"]:
        """Vectors (float32) in whitened coordinates, scaled to length 1."""
        seen = vectors.float() @ self.whitening
        return seen / seen.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _clear(gradient: Tensor, precision: float) -> Tensor:
    """The directions of a gradient that stand clearly above the rounding of what was stored (rows, orthonormal)."""
    sizes = gradient.norm(dim=1)
    matrix = gradient[sizes > 0] / sizes[sizes > 0, None]
    _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    return rows[values > constants().clear_gap * rounding_floor(matrix, precision)]


def _whitening(usual: Tensor) -> Tensor:
    """One over the root of the second moments of a sample, its weakest directions held back."""
    moments = usual.T @ usual / len(usual)
    eye = torch.eye(len(moments)).to(moments)
    held = torch.linalg.cholesky(moments + constants().whitening_ridge * moments.trace() / len(moments) * eye)
    return torch.linalg.solve_triangular(held, eye, upper=False).T  # any root does: spans lie the same in all


@dataclass(frozen=True)
class Explained:
    """What prefixes explain of a tap's directions.

    Attributes:
        wanted: The directions.
        basis: float32, orthonormal directions of each prefix's rows.
        rest: float32, what each prefix leaves of the directions.
    """

    wanted: Wanted
    basis: Float[Tensor, "prefixes length seen"]
    rest: Float[Tensor, "prefixes wanted seen"]

    @classmethod
    def nothing(cls, wanted: Wanted) -> Explained:
        """The state of one prefix without tokens."""
        return cls(wanted, wanted.directions.new_empty(1, 0, wanted.directions.shape[1]), wanted.directions[None])

    def gains(self, vectors: Float[Tensor, "rows inputs"], places: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """How much each row would explain of what its prefix leaves: squared lengths, summed over directions.

        Args:
            vectors: float32, what enters the tap.
            places: int64, each row's prefix.
        """
        seen, found = self.wanted.white(vectors), vectors.new_zeros(len(vectors))
        for place in places.unique():
            own = (places == place).nonzero()[:, 0]
            found[own] = self._gains(seen[own], int(place))
        return found

    def gains_of_all(self, vectors: Float[Tensor, "rows inputs"]) -> Float[Tensor, "prefixes rows"]:
        """The same of every row behind every prefix.

        Args:
            vectors: float32, what enters the tap.
        """
        seen = self.wanted.white(vectors)
        return torch.stack([self._gains(seen, place) for place in range(len(self.basis))])

    def _gains(self, seen: Tensor, place: int) -> Tensor:
        beyond = 1 - (seen @ self.basis[place].T).square().sum(1)
        # What lies within rounding in the span of earlier rows, as a token that was there before, adds nothing.
        return (seen @ self.rest[place].T).square().sum(1) / beyond.clamp(min=constants().nothing_new)

    def grown(self, vectors: Float[Tensor, "rows inputs"], places: Int[Tensor, " rows"]) -> Explained:
        """The state of prefixes with one row more.

        Args:
            vectors: float32, what enters the tap.
            places: int64, which prefix each of them extends.
        """
        basis, rest, fresh = self.basis[places], self.rest[places], self.wanted.white(vectors)[:, None]
        for _ in range(2):  # once leaves what rounding makes of the longest part
            fresh = fresh - (fresh @ basis.mT) @ basis
        size = fresh.norm(dim=2, keepdim=True)
        fresh = torch.where(size > constants().nothing_new, fresh / size.clamp(min=1e-30), 0.0)
        return Explained(self.wanted, torch.cat([basis, fresh], 1), rest - (rest @ fresh.mT) @ fresh)

    def left(self) -> Float[Tensor, " prefixes"]:
        """For each prefix the length of what it leaves, as a share of all (float32)."""
        return (self.rest.square().sum((1, 2)) / len(self.wanted.directions)).sqrt()
