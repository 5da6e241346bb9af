"""How good the searches of an index are.

recall       how much of what an exact search finds do searches by HNSW find?
collection   questions with judged answers, from a directory
judged       how well each mode of search answers them
audited      questions of the tool server's record, for a person to judge
gates        does a measurement reach what was asked of it?
pictures     shapes as SVG or PNG
drawing      measurements as shapes
"""
