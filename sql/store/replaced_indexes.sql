-- Unique indexes of the application that were replaced.
SELECT name, table_name, definition, keys, predicate, constraint_words, replacement
FROM standpipe.replaced_indexes ORDER BY table_name, name
