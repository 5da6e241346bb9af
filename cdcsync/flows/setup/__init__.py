"""The steps before following starts.

    gaps          a slot or server that is not where we left it
    differences   what an index needs once its fingerprint is another one
    needs         which load an index needs once its configuration or its table is another one, and why
    indexes       the relations of each index, its row, and the load that it asks for
    start         shared tables, publication, slot and the starting point

A file imports only from lines above its own.
"""
