"""Time and peak memory of retrieval over a cohort of CT-RATE's size, on random features.

    OMP_NUM_THREADS=2 python -m tests.benchmarks.retrieval --out FILE.json
    python -m tests.benchmarks.retrieval --device cuda --scored 3039

Two parts, each in a process of its own: scoring all sentences in some volumes (``--scored``), whose seconds a volume
are multiplied to tell those of all; and, on a table of all reports by all volumes, ranks with bootstrap intervals both
ways, beside shuffled pairs, and volumes by shared labels. Scoring without chunks would hold sentences x patches cosines
of a volume at once, and a table of all sentences in all volumes. On a CPU, times are processor seconds of all threads.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from custom_components.evaluation.metrics import resample
from custom_components.evaluation.retrieval import (
    ReportScores,
    chance_label_metrics,
    cross_retrieval,
    label_metrics,
    label_queries,
)
from custom_components.losses import SentenceVolumeScore

from tests.benchmarks.measure import GIB, alone, environment, print_table, wait, write_json


def scoring(
    volumes: int, sentences: int, patches: int, size: int, pool: str, scored: int, device: str
) -> dict[str, Any]:
    """Seconds a volume of all reports' scores; each report has its share of the sentences."""
    torch.manual_seed(0)
    names = [str(i) for i in range(sentences)]
    reports = [names[i::volumes] for i in range(volumes)]
    features = torch.randn(sentences, size, device=device)
    told = ReportScores(reports, names, features, SentenceVolumeScore(pool))
    volume = torch.randn(1, patches, size, device=device)
    told(volume)
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    for _ in range(scored):
        wait()
        start = clock()
        told(volume)
        wait()
        seconds.append(clock() - start)
    return {"seconds_a_volume": float(np.median(seconds))}


def ranking(volumes: int, size: int, classes: int, resamples: int) -> dict[str, Any]:
    """Seconds of what follows from the scores."""
    random = np.random.RandomState(0)
    torch.manual_seed(0)
    tables = {name: torch.randn(volumes, volumes) for name in ("simcrop", "random_encoder", "embedding")}
    relevant, weights = torch.eye(volumes, dtype=torch.bool), resample(range(volumes), resamples, 0)
    start = time.process_time()
    for transpose in (False, True):
        scored = {name: table.T if transpose else table for name, table in tables.items()}
        cross_retrieval(scored, relevant, [5, 10, 50, 100], weights, 0)
    ranked = time.process_time()
    labels, patients = random.binomial(1, 0.2, (volumes, classes)), [str(i) for i in range(volumes)]
    of_queries = resample(label_queries(labels), resamples, 0)
    for _ in range(4):  # contenders
        label_metrics(torch.randn(volumes, size), labels, patients, [1, 5, 10, 50], of_queries)
    chance_label_metrics(labels, patients, [1, 5, 10, 50])
    return {"between_seconds": ranked - start, "among_seconds": time.process_time() - ranked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=3039)
    parser.add_argument("--sentences", type=int, default=60_000)
    parser.add_argument("--patches", type=int, default=2744)
    parser.add_argument("--size", type=int, default=768, help="channels of the common space")
    parser.add_argument("--classes", type=int, default=18)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--scored", type=int, default=3, help="volumes that are timed")
    parser.add_argument("--device", default="cpu", help="where sentences are scored")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    size = (args.volumes, args.sentences, args.patches, args.size)
    rows, results = [], {}
    for pool in ("topk_mean", "lse"):
        found = results[f"scores, {pool}"] = alone(scoring, *size, pool, args.scored, args.device)
        hours = found["seconds_a_volume"] * args.volumes / 3600
        rows.append(
            (f"scores, {pool}", f"{found['seconds_a_volume']:.3g} s a volume, {hours:.2g} h", found["peak_gib"])
        )
    found = results["ranks"] = alone(ranking, args.volumes, args.size, args.classes, args.resamples)
    rows.append(("ranks between reports and volumes", f"{found['between_seconds']:.3g} s", found["peak_gib"]))
    rows.append(("precision among volumes", f"{found['among_seconds']:.3g} s", found["peak_gib"]))
    whole = [args.sentences * args.patches * 4 / GIB, args.sentences * args.volumes * 4 / GIB]
    print_table("retrieval", ("part", "time", "peak GiB"), rows)
    print(f"\nunchunked: {whole[0]:.2g} GiB of cosines a volume, {whole[1]:.2g} GiB of sentence-volume scores")
    write_json(args.out, {"environment": environment(), "sizes": vars(args), **results})


if __name__ == "__main__":
    main()
