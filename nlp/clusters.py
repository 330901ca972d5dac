"""The rows that one expert for each cluster learns (MBC, arXiv 2405.11157)."""

from collections.abc import Sequence

from mole_vl.clusters import Clusters
from mole_vl.faults import refuse
from nlp.data import TextRow


def cluster_rows(clusters: Clusters, rows: Sequence[TextRow]) -> dict[str, list[TextRow]]:
    """Rows of many tasks by cluster: what `nlp.train_experts` trains one expert each on.

    Args:
        clusters: Of experts that are called as their tasks are.
        rows: In the order in which they are to stand; tasks without an expert are left out.

    Returns:
        Rows by the cluster's name, its members' joined by `+`, as `cluster_averages` calls it.

    Raises:
        ValueError: An expert whose task has no row.
    """
    tasks = {row.task for row in rows}
    refuse("cluster_rows", [f"no row of {name}" for name in clusters.names if name not in tasks])
    return {
        "+".join(group): [row for row in rows if row.task in group] for group in clusters.groups
    }
