"""target/ddl."""
