"""How good the searches of an index are.

    sampling     the stored vectors that recall is measured with
    searches     one vector's search, by HNSW and exactly
    recall       how much of what an exact search finds do searches by HNSW find?
    periodic     the worker's own measurements of recall
    intervals    how sure a difference between two means is
    collection   questions with judged answers, from a directory
    judged       how well each mode of search answers them
    audited      questions of the tool server's record, for a person to judge
    gates        does a measurement reach what was asked of it?
    pictures     shapes as SVG or PNG
    drawing      measurements as shapes

A file here imports only from lines above its own.
"""
