"""An index as a retriever of LangChain.

    with Index.open(load_config("cdcsync.toml"), "tickets") as tickets:
        retriever = CdcsyncRetriever(index=tickets, k=5)
        documents = retriever.invoke("forgot my login")

It may be used by several threads, and with `ainvoke` too.
"""

from __future__ import annotations

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from cdcsync.sync import Index


class CdcsyncRetriever(BaseRetriever):
    """Retrieves the best chunk of each of the `k` best documents."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    index: Index
    k: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(page_content=hit.content, metadata={**hit.key, **hit.carried, "score": hit.score})
            for hit in self.index.search(query, k=self.k)
        ]
