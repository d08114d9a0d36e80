"""Model families as data (`spec`), one decoder for all of them (`decoder`)."""
