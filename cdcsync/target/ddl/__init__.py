"""The relations in the target: how they are created, upgraded and built.

    names             the names of an index's relations
    sizes             how large the vectors of each generation are
    languages         the words of a text, by the language of its row
    bm25              the index by which pg_textsearch ranks words
    filters           the operators that a filter allows for each column
    nearness          the nearest vectors, as SQL
    policies          row-level security for the tool server's role
    grants            grants and options, which outlive the relation
    serving           the privileges of the tool server's role
    views             how views are made and follow their index
    marked            all that is one index's, found by comments
    chunks_view       the view of all chunks
    hits              the type of a search's rows
    search_function   the text of an index's search function
    standing          statements that are left out where they would change nothing
    searching         creates, upgrades and drops that function
    tiers             one index's vectors, and the rules for writing them
    relations         one index's other tables
    building          HNSW and keyword indexes
    rebuilding        the settled vectors built anew, beside those that are searched
    generations       the vectors of other generations, and the switch from one to another
    upgrading         the vectors table of earlier versions becomes two tiers
    shared            the tables that all indexes share
    missing           what somebody dropped of all that

A file imports only from lines above its own.
"""
