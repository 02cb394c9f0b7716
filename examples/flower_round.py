"""A round of Flower with four clients, in this process: what the server can keep, and a client that looks first.

    python examples/flower_round.py captured
    dager recover captured/round-001-client-1.safetensors --model captured/round-001-model

The apps are as one would write them for `flwr run`; of this project there are a line around the strategy and a mod.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from transformers import GPT2Config, PreTrainedModel

from dager_tutorial import load_model
from dager_tutorial.frameworks.flower import Auditing, Capturing, run_in_process
from dager_tutorial.models.heads import Head, with_head
from dager_tutorial.models.language_model import LanguageModel

TEXTS = [
    ["The river was cold and quiet.", "My sister sold her small house.", "He never came back from the war."],
    ["We never talk about money at dinner.", "A teacher told the children a story.", "Call me when it hurts."],
    ["He lost his job in May.", "The doctor called me twice.", "The rent is two months late."],
    ["Please keep this between us.", "I will be late again tonight.", "The test came back positive."],
]
"""What the four clients have; labels alternate."""

EPOCHS, RATE = 2, 1e-5


def small_model(folder: Path) -> LanguageModel:
    """A GPT-2 of random weights, three blocks deep and 128 wide, which the server hands out.

    Args:
        folder: Where its configuration is written.
    """
    GPT2Config(
        vocab_size=49152, n_embd=128, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ).save_pretrained(folder)
    return load_model(f"random:{folder}")


def classifier(model: LanguageModel) -> PreTrainedModel:
    """A copy of the model under a head with two classes, to train.

    Args:
        model: The model that the server hands out.
    """
    return copy.deepcopy(with_head(model.network, model.tokenizer, Head(std=0.02))).requires_grad_(True)


def client_app(model: LanguageModel, *mods: Mod) -> ClientApp:
    """Clients that train for some epochs, a text a step, and send their new weights.

    Args:
        model: The model.
        mods: What sees a message before it is sent.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        network, texts = classifier(model), TEXTS[int(context.node_config["partition-id"])]
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
        for _ in range(EPOCHS):
            for label, text in enumerate(texts):
                ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
                network(ids, labels=torch.tensor([label % 2])).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        metrics = MetricRecord({"num-examples": len(texts)})
        content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def server_app(model: LanguageModel, folder: Path, rounds: int = 1) -> ServerApp:
    """A server that averages, and keeps what it is sent.

    Args:
        model: The model.
        folder: Where the updates are kept.
        rounds: How many rounds there are.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Capturing(FedAvg(fraction_evaluate=0.0), folder, model, learning_rate=RATE)
        strategy.start(grid, ArrayRecord(classifier(model).state_dict()), num_rounds=rounds)

    return app


def main(folder: Path) -> None:
    """Run a round that is captured, then one whose clients look before they send.

    Args:
        folder: Where the files go.
    """
    model = small_model(folder / "config")
    run_in_process(server_app(model, folder), client_app(model), clients=len(TEXTS))
    for path in sorted(folder.glob("*.safetensors")):
        print(f"captured {path.name}")
    refusals = run_in_process(server_app(model, folder), client_app(model, Auditing(model)), clients=len(TEXTS))
    for client, reason in refusals:
        print(f"client {client}: {reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
