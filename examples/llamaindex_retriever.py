"""An index as a retriever of LlamaIndex.

    with Index.open(load_config("cdcsync.toml"), "tickets") as tickets:
        retriever = CdcsyncRetriever(tickets, k=5)
        nodes = retriever.retrieve("forgot my login")

It may be used by several threads, and with `aretrieve` too.
"""

from __future__ import annotations

from asyncio import to_thread

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from cdcsync.sync import Index


class CdcsyncRetriever(BaseRetriever):
    """Retrieves the best chunk of each of the `k` best documents."""

    def __init__(self, index: Index, *, k: int = 4) -> None:
        super().__init__()
        self._index = index
        self._k = k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        nodes = []
        for hit in self._index.search(query_bundle.query_str, k=self._k):
            # Two chunks of a document are two nodes.
            id_ = "/".join([*map(str, hit.key.values()), str(hit.chunk_no)])
            node = TextNode(id_=id_, text=hit.content, metadata={**hit.key, **hit.carried})
            nodes.append(NodeWithScore(node=node, score=hit.score))
        return nodes

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await to_thread(self._retrieve, query_bundle)
