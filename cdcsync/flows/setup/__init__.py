"""The steps before following starts.

    gaps          a slot or server that is not where we left it
    proof         whether the source still has what was applied last
    differences   the requests that an index needs after its fingerprint changed
    needs         the load that an index needs after its configuration or table changed, and why
    approval      changes that wait until somebody approves them
    withdrawn     requests that are taken back, as what they ask for cannot be done
    exchange      chunks of two generations exchange their names, or some of them go
    indexes       the relations of each index, its row, and its load
    start         shared tables, publication, slot and the starting point

A file imports only from lines above its own.
"""
