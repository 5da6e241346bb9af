"""From a row to a document and its chunks. Pure: no socket, no clock, no event loop.

    functions     functions of the user's that make documents or cut them
    templates     templates, rendered here and by a server; the hash of a document
    lexer         words of SQL, and what is read by them
    related       what rows of related tables come to, rendered by the server
    documents     `Documents`: how one index makes documents of rows
    chunks/       cutting documents into chunks that a model reads whole

A file imports only from lines above its own.
"""
