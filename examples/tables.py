"""A table as it comes: which columns matter, how the target moves, and SHAP values beside it (pip install shap)."""

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from ockham.tabular import SparseBNNRegressor


def main() -> None:
    table, target = make_table(400, seed=0)
    held_out = make_table(400, seed=1)
    model = SparseBNNRegressor(random_state=0).fit(table, target)
    print(model.summary())

    lower, upper = model.predict_interval(held_out[0], 0.9)
    print(f"90 % intervals hold {np.mean((lower < held_out[1]) & (held_out[1] < upper)):.1%} of held-out rows")

    effect = model.effect("age")
    print(f"age from {effect.values[0]:.1f} to {effect.values[-1]:.1f}: {effect.mean[-1] - effect.mean[0]:+.2f}")
    with tempfile.TemporaryDirectory() as folder:
        page = model.report(Path(folder) / "table.html", *held_out)
        print(f"a page of {page.stat().st_size / 1e3:.0f} kB")
    if importlib.util.find_spec("shap"):
        print("SHAP, mean size of a column's share:", shares(model, table))


def shares(model: SparseBNNRegressor, table: pd.DataFrame) -> dict[str, float]:
    """Any explainer that asks a function of an array works; columns of levels go in as their codes."""
    import shap

    levels = table["kind"].astype("category")
    codes = table.assign(kind=levels.cat.codes.astype(float)).to_numpy()

    def ask(rows: np.ndarray) -> np.ndarray:
        frame = pd.DataFrame(rows, columns=table.columns)
        frame["kind"] = levels.cat.categories[frame["kind"].astype(int)]
        return model.predict(frame)

    values = shap.Explainer(ask, codes[:20], seed=0)(codes[:10]).values
    return dict(zip(table.columns, np.abs(values).mean(0).round(3).tolist(), strict=True))


def make_table(rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Two columns and a category matter; one column does nothing."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "age": rng.normal(size=rows),
            "dose": rng.normal(size=rows),
            "kind": rng.choice(["a", "b", "c"], rows),
            "idle": rng.normal(size=rows),
        }
    )
    mean = 1.5 * table.age + table.dose.abs() + 2.0 * (table["kind"] == "b")
    return table, (mean + 0.3 * rng.normal(size=rows)).to_numpy()


if __name__ == "__main__":
    main()
