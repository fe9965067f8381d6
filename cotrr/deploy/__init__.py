"""What goes back to the pipeline, and what serves inside it.

from cotrr.deploy import Reranker
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotrr.deploy.reranker import Reranker

__all__ = ["Reranker"]


def __getattr__(name: str) -> Any:
    if name == "Reranker":  # only here is the scorer imported: most of what is in this package needs none
        from cotrr.deploy.reranker import Reranker

        return Reranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
