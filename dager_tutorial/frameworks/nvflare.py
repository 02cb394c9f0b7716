"""NVFLARE: what a DXO holds as an update, and a filter that audits a client's result and blocks it.

Chapter `12_federated`. Needs the extra `nvflare`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from nvflare.apis.dxo import DXO, DataKind, from_file
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.decomposers import common_decomposers
from torch import Tensor

from dager_tutorial.errors import DagerError, UpdateError, quote
from dager_tutorial.frameworks.capturing import difference
from dager_tutorial.frameworks.policy import Policy
from dager_tutorial.server.attack import attack
from dager_tutorial.server.budget import AttackConfig
from dager_tutorial.update import Update
from dager_tutorial.zoo.names import load_model


def read_dxo(path: str | os.PathLike[str]) -> DXO:
    """Read a file that `DXO.to_file` wrote, numpy arrays included.

    NVFLARE's format names the classes that it is made of, and NVFLARE imports them: read files of your own site only.

    Args:
        path: The file.

    Raises:
        UpdateError: It is no such file.
    """
    common_decomposers.register()
    try:
        found = from_file(os.fspath(Path(path).expanduser()))
    except Exception as error:  # whatever NVFLARE's parser makes of a broken file
        raise UpdateError(f"{quote(path)} cannot be read as a DXO ({quote(error)}): give what to_file wrote") from error
    if not isinstance(found, DXO):
        raise UpdateError(f"{quote(path)} holds {type(found).__name__}: give a DXO")
    return found


def update_of_dxo(dxo: DXO, before: Mapping[str, Tensor] | None = None, *, model: str | None = None) -> Update:
    """The update that a DXO holds.

    Args:
        dxo: Of weights or of their difference, as a client sends it.
        before: The weights that the client got, by name. A DXO of weights needs them.
        model: The model's name, for people to read.

    Raises:
        UpdateError: It holds neither, or the weights that the client got are missing.

    Example:
        >>> import numpy as np
        >>> update_of_dxo(DXO(DataKind.WEIGHT_DIFF, {"w": np.ones(2, np.float32)})).kind
        'delta'

    Chapter `12_federated`.
    """
    if dxo.data_kind not in (DataKind.WEIGHT_DIFF, DataKind.WEIGHTS):
        raise UpdateError(
            f"the DXO holds {quote(DataKind(dxo.data_kind).value)}: weights or their difference are an update"
        )
    tensors = {name: torch.as_tensor(value) for name, value in dxo.data.items()}
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if dxo.data_kind == DataKind.WEIGHTS:
        if before is None:
            raise UpdateError("the DXO holds whole weights: give those that the client got, or send their difference")
        floating = difference(floating, before)
    return Update(floating, kind="delta", model=model)


class AuditingFilter(DXOFilter):
    """A filter of task results that attacks a weight difference, and blocks it where the policy objects.

    It stands behind the filters that protect: it sees what leaves. Its arguments can stand in a job's configuration. A
    filter is not told the weights that the client got, so the update is read at those of `model`: in later rounds an
    audit mostly ends without an answer, which blocks unless `unread` allows it. Whole weights are always blocked.

    Args:
        model: The model that is trained, by a name or folder that `load_model` takes.
        confirmed: See `policy.Policy`.
        recovered: See `policy.Policy`.
        unread: See `policy.Policy`.
        time_budget: Seconds that an audit may take.

    Chapter `12_federated`.
    """

    def __init__(
        self,
        model: str,
        confirmed: float = 0.0,
        recovered: float = 0.0,
        unread: bool = False,
        time_budget: float = 60.0,
    ) -> None:
        super().__init__([DataKind.WEIGHTS, DataKind.WEIGHT_DIFF], None)
        self.model = load_model(model)
        self.policy, self.limits = Policy(confirmed, recovered, unread), AttackConfig(time_budget=time_budget)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Attack what is about to be sent.

        Args:
            dxo: What the client sends.
            shareable: What it is part of.
            fl_ctx: The context.

        Returns:
            None: nothing was changed.

        Raises:
            ContentBlockedException: It may not be sent, or could not be audited.
        """
        try:
            found = attack(self.model, update_of_dxo(dxo), config=self.limits)
        except DagerError as error:
            raise ContentBlockedException(f"not sent: the audit failed ({error})") from error
        objection = self.policy.objection(found)
        if objection is not None:
            raise ContentBlockedException(f"not sent: {objection}")
        return None
