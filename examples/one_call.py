"""One call: a network and a loader in, a smaller network with its posterior out; then predictions that know doubt."""

import torch

import ockham
from ockham.zoo.data import Batches, digits
from ockham.zoo.networks import digits_mlp


def main() -> None:
    torch.manual_seed(0)
    data = digits()
    loader = Batches(data.train_x, data.train_y, batch_size=64, shuffle=True)
    result = ockham.compress(
        digits_mlp(),
        loader,
        training=ockham.Training(epochs=60, learning_rate=3e-3),
        on_progress=show,
    )

    prediction = result.predict(data.test_x)
    right = prediction.probabilities.argmax(1) == data.test_y
    print(f"{result.keep_share:.1%} of the weights stay, test accuracy {right.float().mean():.1%}")

    # Mutual information: what the draws of the network disagree about. Noise images should raise it.
    noise = torch.randn(data.test_x.shape, generator=torch.Generator().manual_seed(0))
    foreign = result.predict(noise)
    print(f"epistemic uncertainty, nats: right answers {prediction.epistemic[right].mean():.3f}, ", end="")
    print(f"wrong ones {prediction.epistemic[~right].mean():.3f}, pure noise {foreign.epistemic.mean():.3f}")


def show(progress) -> None:
    """Print the epochs after which weights went."""
    done = progress.round
    if done is not None:
        print(
            f"epoch {progress.epoch:3}: removed {done.removed:6,}, kept {done.kept_share:6.2%}, "
            f"predicted gain {done.delta_f:9,.0f} nats, free energy {done.free_energy:10,.0f} nats"
        )


if __name__ == "__main__":
    main()
